"""From the bytes of an HTTP body to a checked request object, or to a clear refusal."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec
from aiohttp import web

from pshare_jax.frontend.requests import UNSERVED, StreamOptions
from pshare_jax.serve.bodies import check_headers, check_items, decompress, read_body, strip_bom
from pshare_jax.serve.errors import ApiError
from pshare_jax.serve.offload import is_large
from pshare_jax.serve.service import SERVICE, WARNINGS

log = logging.getLogger(__name__)

T = TypeVar("T", bound=msgspec.Struct)

_MISSING = re.compile(r"Object missing required field `(.*?)`(?: - at `\$\.?(.*)`)?", re.DOTALL)
_INVALID = re.compile(r"(.*?)(?: - at `\$\.?(.*)`)?", re.DOTALL)
# What means no more than leaving the field out.
_ABSENT = frozenset({b"null", b"[]", b"{}", b"false", b"0", b'""', b'"none"', b'"auto"'})
_NESTED: dict[str, type[msgspec.Struct]] = {"stream_options": StreamOptions}
_SHOWN_FIELDS = 10


@dataclass(frozen=True)
class Parsed(Generic[T]):
    """A request, and the names of fields in it that nobody knows."""

    value: T
    unknown: tuple[str, ...]


async def read_request(request: web.Request, kind: type[T]) -> T:
    """Reads the body of `request` as a `kind`; what it ignores goes into the response's headers.

    Raises:
        ApiError: 400 for a body that is no such object, 408 for a slow client, 413 for a large
            body, 415 for another content type.
    """
    service = request.app[SERVICE]
    config = service.config
    encoding = check_headers(request, config.max_body_bytes)
    body = await read_body(request, config.max_body_bytes, config.read_timeout_seconds)

    def work() -> Parsed[T]:
        text = decompress(body, encoding, config.max_body_bytes)
        check_items(text, config.max_body_items)
        return parse(strip_bom(text), kind)

    parsed = await service.offload.run_if(is_large(request), work)
    if parsed.unknown:
        names = ", ".join(name[:60] for name in parsed.unknown[:_SHOWN_FIELDS])
        if config.strict:
            raise ApiError(
                400,
                f"Unrecognized request argument supplied: {names}",
                param=parsed.unknown[0],
                code="unknown_field",
            )
        # Names come from the client: neither a log nor a header may hold its control characters.
        warning = f"unknown fields ignored: {ascii(names)[1:-1]}"
        request[WARNINGS] = warning
        service.warn_once(warning)
    return parsed.value


def parse(body: bytes, kind: type[T]) -> Parsed[T]:
    """Decodes JSON text.

    Raises:
        ApiError: 400, naming the field at fault as `param`.
    """
    try:
        value = msgspec.json.decode(body, type=kind)
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from None
    except RecursionError:
        raise _malformed("it is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _malformed(str(error)) from None
    except ValueError as error:  # Python does not read numbers of thousands of digits
        raise _malformed(str(error).partition(";")[0]) from None
    return Parsed(value, tuple(_unknown(fields, kind)))


def _unknown(fields: dict[str, msgspec.Raw], kind: type[msgspec.Struct]) -> Iterator[str]:
    """Names of fields that `kind`, or an object directly below it, does not have."""
    known = set(kind.__struct_fields__)
    for name, raw in fields.items():
        if name in known:
            inner = _NESTED.get(name)
            if inner is not None and bytes(raw)[:1] == b"{":
                nested = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
                yield from (f"{name}.{field}" for field in _unknown(nested, inner))
        elif bytes(raw) not in _ABSENT:
            if name in UNSERVED:
                raise ApiError(
                    400, f"{name} is not served: {UNSERVED[name]}", param=name, code="not_served"
                )
            yield name


def _malformed(reason: str) -> ApiError:
    message = f"We could not parse the JSON body of your request: {reason}"
    return ApiError(400, message, code="invalid_json")


def _refusal(message: str) -> ApiError:
    if match := _MISSING.fullmatch(message):
        name = f"{match[2]}.{match[1]}" if match[2] else match[1]
        return ApiError(
            400, f"Missing required parameter: {name}", param=name, code="missing_field"
        )
    match = _INVALID.fullmatch(message)
    assert match is not None
    reason, param = match[1].replace("`", "'"), match[2] or None
    where = f" for {param}" if param else ""
    return ApiError(400, f"Invalid value{where}: {reason}", param=param, code="invalid_type")
