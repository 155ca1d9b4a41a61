"""What pages are coded by on their way to another process, and how two processes agree on it.

Who reads says in a `Wanted` what it can decode; who sends answers with a `Coding`, which names its
codebook by a digest. The codebook itself is sent along to those who do not have it. Whoever says
nothing gets pages as they are, and so does everybody until there is a codebook: it is made of the
first pages that are sent, since those are of the base that they are for.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Annotated

import msgspec
import numpy as np

from pshare_jax.config import KvCodec
from pshare_jax.core.connector import TransferError
from pshare_jax.errors import ConfigError
from pshare_jax.kernels.kv_codec.api import PageCodec, page_codec
from pshare_jax.kernels.kv_codec.codebook import Codebook, calibrate, supported
from pshare_jax.kernels.native.library import load_library

logger = logging.getLogger(__name__)

HEADER = "Pshare-Codec"
"""HTTP header of a request (`Wanted`) and of its answer (`Coding`)."""

PAYING_RATIO = 1.15
"""Pages that compress less are sent as they are."""

SAMPLE_PAGES = 8
"""Pages that a codebook is made of, and tried on, at most."""

_LEAST_PAGES = 4
"""Of a sample, unless a codec was asked for by name."""

_VERSION = 1


class Wanted(msgspec.Struct, frozen=True):
    """How a reader would have pages.

    Args:
        codecs: that it can decode.
        coded: whether they had better be coded this time.
        book: digest of the codebook that it has from this process; empty is none.
    """

    codecs: list[str]
    coded: bool
    book: str = ""

    def encode(self) -> str:
        """As a header."""
        return msgspec.json.encode(self).decode()


Rate = Annotated[float, msgspec.Meta(gt=0)]


class Coding(msgspec.Struct, frozen=True):
    """What a process codes pages by.

    Args:
        codec: its name.
        book: digest of the codebook.
        encode: bytes of pages that it codes a second.
        decode: bytes of pages that it would decode a second.
        ratio: bytes of a page by those of its record.
        coded: whether the pages of this answer are.
        table: whether the codebook comes before them.
    """

    codec: str
    book: str
    encode: Rate
    decode: Rate
    ratio: Rate
    coded: bool = False
    table: bool = False

    def header(self) -> str:
        """As a header."""
        return msgspec.json.encode(self).decode()


class CodingError(TransferError):
    """What came is not what its sender says that it is.

    Args:
        reason: `answer`, `codec`, `book` or `record`; counted by it.
        text: what was wrong.
    """

    def __init__(self, reason: str, text: str):
        super().__init__(text)
        self.reason = reason


def read_wanted(header: str | None) -> Wanted | None:
    """What a request asks for; None for one that says nothing that can be understood."""
    if not header:
        return None
    try:
        return msgspec.json.decode(header, type=Wanted)
    except msgspec.DecodeError:
        return None


def read_coding(header: str | None) -> Coding | None:
    """What an answer says; None for one of a process that codes nothing.

    Raises:
        CodingError: it cannot be understood.
    """
    if not header:
        return None
    try:
        return msgspec.json.decode(header, type=Coding)
    except msgspec.DecodeError as error:
        raise CodingError("answer", f"{HEADER} of the answer: {error}") from None


def table_shape(codec: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Of a codebook for pages `[L, 2, kv_heads, page_size, head_dim]`."""
    return (*shape[:3], shape[4]) if codec == "planes" else (15,)


def digest(book: Codebook, shape: Sequence[int]) -> str:
    """Names a codebook for pages of a shape."""
    what = msgspec.json.encode([_VERSION, book.codec, list(shape)]) + book.table.tobytes()
    return hashlib.blake2b(what, digest_size=16).hexdigest()


def read_book(coding: Coding, table: bytes, shape: Sequence[int]) -> Codebook:
    """The codebook that a sender has sent along.

    Raises:
        CodingError: it is not the one that was named.
    """
    values = np.frombuffer(table, np.uint8)
    wanted = table_shape(coding.codec, shape)
    if len(values) == np.prod(wanted):
        book = Codebook(coding.codec, values.reshape(wanted))
        if digest(book, shape) == coding.book:
            return book
    raise CodingError("book", f"{len(values)} bytes came, which are not codebook {coding.book}")


def usable_codecs(codec: KvCodec, shape: Sequence[int], dtype: str) -> list[str]:
    """Codecs that a process may use by its setting `cluster.codec`, the best first.

    Args:
        codec: the setting.
        shape: of pages, `[L, 2, kv_heads, page_size, head_dim]`.
        dtype: of their values.

    Raises:
        ConfigError: it names one that is not for such pages.
    """
    can = supported(tuple(shape), dtype)
    if codec == "raw":
        return []
    if codec == "auto":
        # Without C++ coding takes longer than any link.
        return ["planes", "top16"] if can and load_library() is not None else []
    if not can:
        raise ConfigError(
            f"cluster.codec: {codec} is for bfloat16 pages of a multiple of 64 values a head, but "
            f"they are {dtype} {tuple(shape)}; use `auto` or `raw`"
        )
    return [codec]


class PageCoder:
    """Codes the pages that a process sends to others. Thread-safe.

    Args:
        setting: `cluster.codec`.
        shape: of pages, `[L, 2, kv_heads, page_size, head_dim]`.
        dtype: of their values.
        clock: seconds, from any start.

    Raises:
        ConfigError: as of `usable_codecs`.
    """

    def __init__(
        self,
        setting: KvCodec,
        shape: Sequence[int],
        dtype: str,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.shape = tuple(shape)
        self.page_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._must = setting in ("planes", "top16")
        self._codecs = usable_codecs(setting, shape, dtype)
        self._clock = clock
        self._lock = threading.Lock()
        self._sample: list[np.ndarray] = []
        self._learnt = not self._codecs
        self._calibration: threading.Thread | None = None
        self.codec: PageCodec | None = None
        self._coding: Coding | None = None

    @property
    def coding(self) -> Coding | None:
        """What is said to readers; None while, or where, pages are sent as they are."""
        return self._coding

    @property
    def learns(self) -> bool:
        """Whether it still has to see pages."""
        return not self._learnt

    def settle(self) -> None:
        """Waits until a codebook that is being made is there, or was left."""
        if self._calibration is not None:
            self._calibration.join()

    def answer(self, wanted: Wanted | None) -> Coding | None:
        """What a reader is told: with `coded`, what it is sent is."""
        coding = self._coding
        if wanted is None or coding is None or coding.codec not in wanted.codecs:
            return None
        table = wanted.coded and wanted.book != coding.book
        return msgspec.structs.replace(coding, coded=wanted.coded, table=table)

    def learn(self, staged: np.ndarray, count: int) -> None:
        """Sees pages that are about to be sent: makes the codebook, once there are enough.

        Nobody waits for that, unless a codec was asked for by name.

        Args:
            staged: `[L, n, 2, kv_heads, page_size, head_dim]`.
            count: of its pages; the last one may be half-filled.
        """
        with self._lock:
            if self._learnt:
                return
            # The end of a prompt is no example, unless it is all that there is.
            full = max(count - 1, 1) if self._must else count - 1
            for index in range(min(full, SAMPLE_PAGES - len(self._sample))):
                self._sample.append(staged[:, index].view(np.uint16).copy())
            enough = len(self._sample) >= (1 if self._must else _LEAST_PAGES)
            if not enough:
                return
            self._learnt = True
            sample, self._sample = np.stack(self._sample), []
        if self._must:
            self._calibrate(sample)
            return
        calibration = threading.Thread(
            target=self._calibrate, args=(sample,), name="codebook", daemon=True
        )
        calibration.start()
        self._calibration = calibration

    def record(self, staged: np.ndarray, index: int, head: int = 0) -> memoryview:
        """The record of a page, behind `head` bytes that are free.

        A page that does not shrink comes as it is, layer by layer.
        """
        assert self.codec is not None
        out = np.empty(head + self.page_bytes, np.uint8)
        length = self.codec.encode(staged, index, out[head:-1])
        if length is None:
            length, layers = self.page_bytes, len(staged)
            out[head:].reshape(layers, -1)[:] = staged[:, index].reshape(layers, -1).view(np.uint8)
        return out[: head + length].data

    def _calibrate(self, sample: np.ndarray) -> None:
        """Makes the codebook of half of the sample `[n, L, ...]`, and tries it on the other one."""
        name = self._codecs[0]
        half = max(len(sample) // 2, 1)
        rest = sample[half:] if len(sample) > half else sample
        book = calibrate(name, sample[:half])
        codec = page_codec(book)
        staged = np.ascontiguousarray(np.moveaxis(rest, 0, 1))
        out, back = np.empty(2 * self.page_bytes, np.uint8), np.empty_like(staged)
        lengths, encode, decode = [], float("inf"), float("inf")
        for index in range(len(rest)):
            started = self._clock()
            length = codec.encode(staged, index, out)
            between = self._clock()
            assert length is not None, "a record is never twice as large as its page"
            codec.decode(out[:length], back, index)
            encode = min(encode, max(between - started, 1e-9))
            decode = min(decode, max(self._clock() - between, 1e-9))
            lengths.append(length)
        ratio = rest.nbytes / sum(lengths)
        rates = self.page_bytes / encode, self.page_bytes / decode
        logger.info(
            "pages for other hosts: %s compresses to 1/%.3f, at %.1f and %.1f GB/s",
            name,
            ratio,
            *(rate / 1e9 for rate in rates),
        )
        if self._must or ratio >= PAYING_RATIO:
            whole = calibrate(name, sample)
            self.codec = page_codec(whole)
            self._coding = Coding(name, digest(whole, self.shape), *rates, ratio)
