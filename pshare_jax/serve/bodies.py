"""The bytes of a request's body: read in time, decompressed, and small enough to be decoded."""

from __future__ import annotations

import asyncio
import zlib

import numpy as np
from aiohttp import web

from pshare_jax.serve.errors import ApiError

_BOM = b"\xef\xbb\xbf"
_NUMBERS_AN_ITEM = 16
# zlib's window sizes: a gzip header, a zlib header, none.
_GZIP, _ZLIB, _RAW = 31, 15, -15


def body_too_large(limit: int) -> ApiError:
    """413. The connection is closed: what the client still sends is of no use."""
    return ApiError(
        413,
        f"the request body is larger than the server accepts ({limit} bytes)",
        code="body_too_large",
        close=True,
    )


def check_headers(request: web.Request, limit: int) -> str:
    """The content encoding of the body to come.

    Raises:
        ApiError: 413 or 415: it is too large, or not JSON, or in an encoding that is not read.
    """
    if request.content_type != "application/json":
        raise ApiError(
            415,
            f"content type {request.content_type[:100]!r} is not accepted; send application/json",
            code="unsupported_media_type",
        )
    encoding = request.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise ApiError(
            415,
            f"content encoding {encoding[:100]!r} is not accepted; send gzip, deflate or none",
            code="unsupported_content_encoding",
            headers={"Accept-Encoding": "gzip, deflate"},
        )
    if request.content_length is not None and request.content_length > limit:
        raise body_too_large(limit)
    return encoding


async def read_body(request: web.Request, limit: int, timeout: float) -> bytes:
    """The body as it was sent, at most `limit` bytes, in at most `timeout` seconds.

    Raises:
        ApiError: 400 for broken framing, 408 for a slow client, 413 for a large body.
    """
    try:
        async with asyncio.timeout(timeout):
            return await request.read()
    except TimeoutError:
        raise ApiError(
            408,
            f"the request body did not arrive within {timeout:g} seconds",
            code="request_timeout",
            close=True,
        ) from None
    except web.HTTPRequestEntityTooLarge:
        raise body_too_large(limit) from None
    except (web.RequestPayloadError, web.HTTPException) as error:
        raise ApiError(
            400,
            f"the request body is not framed as HTTP/1.1 has it: {error}",
            code="invalid_http",
            close=True,
        ) from None


def decompress(body: bytes, encoding: str, limit: int) -> bytes:
    """The body without its content encoding.

    Raises:
        ApiError: 400 for data that are not so encoded, 413 for more than `limit` bytes of them.
    """
    if encoding in ("", "identity"):
        return body
    decoder = zlib.decompressobj(_deflate_window(body) if encoding == "deflate" else _GZIP)
    try:
        text = decoder.decompress(body, limit + 1)
        if len(text) > limit:
            raise body_too_large(limit)
        text += decoder.flush()
    except zlib.error as error:
        raise _not_encoded(encoding, str(error)) from None
    if not decoder.eof:
        raise _not_encoded(encoding, "it is cut short")
    if decoder.unused_data:
        raise _not_encoded(encoding, "something follows its end")
    return text


def _deflate_window(body: bytes) -> int:
    # By the book it has zlib's header; some clients send none.
    return _ZLIB if body and body[0] & 0x0F == 8 else _RAW


def _not_encoded(encoding: str, reason: str) -> ApiError:
    return ApiError(
        400,
        f"the request body is not valid {encoding}: {reason}",
        code="invalid_content_encoding",
    )


def strip_bom(body: bytes) -> bytes:
    """The body without a byte order mark, which some clients write before JSON."""
    return body.removeprefix(_BOM)


def check_items(body: bytes, max_items: int) -> None:
    """Counts texts, lists, objects and numbers of JSON text before any of them is made.

    A list of a million texts takes its time to decode, which nothing can interrupt; to count
    delimiters outside of quotes takes a hundredth of it, for any bytes.

    Raises:
        ApiError: 400: there are more than `max_items`; numbers count for a sixteenth.
    """
    if len(body) < max_items:
        return
    text = np.frombuffer(body.replace(rb"\\", b"").replace(rb"\"", b""), np.uint8)
    quotes = text == ord('"')
    # Parity of the quotes so far; that the sum wraps around does not change it.
    outside = np.bitwise_and(np.cumsum(quotes, dtype=np.uint8), 1) == 0
    opened = np.count_nonzero(((text == ord("[")) | (text == ord("{"))) & outside)
    items = int(opened) + int(np.count_nonzero(quotes)) // 2
    values = int(np.count_nonzero((text == ord(",")) & outside))
    if items + values // _NUMBERS_AN_ITEM > max_items:
        raise ApiError(
            400,
            f"the request body holds {items} texts, lists and objects, and {values} values in all; "
            f"the server reads {max_items}, numbers counted for a sixteenth",
            code="too_many_items",
        )
