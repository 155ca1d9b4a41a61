"""Whether pages had better be coded on their way from another process: measured, for each pair.

The price of a transfer of k pages of n bytes, over a link of B bytes a second, at a ratio r, coded
at E and decoded at D bytes a second:

    as they are      k n / B
    coded            (k - 1) of the slowest of n / E, n / (r B), n / D; and each of these once,
                     or k times each, where all are coded before any is sent

So it begins with pages as they are, which tells B. Once pages have come coded, what was measured
counts, and both ways are tried again now and then.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pshare_jax.config import KvCodec
from pshare_jax.kernels.kv_codec.codebook import Codebook
from pshare_jax.kv.coding import Coding, Wanted

logger = logging.getLogger(__name__)

TRY_AGAIN = 32
"""One in so many transfers goes in the way that seems to be slower."""

MARGIN = 0.95
"""Coding has to take less than this part of the time."""

LEAST_BYTES = 64 * 1024
"""Transfers of fewer bytes say nothing of a link."""

AVOID_SECONDS = 30.0
"""How long pages come as they are from a process whose coded pages were not what they should be."""

_KEPT = 0.8
"""What is left of older measurements at each new one."""


@dataclass
class _Rate:
    """Bytes a second: large transfers count more, and late ones.

    Nothing is known after the first one, which pays for what is done but once.
    """

    num_bytes: float = 0.0
    seconds: float = 0.0
    begun: bool = False

    def add(self, num_bytes: float, seconds: float) -> None:
        if self.begun:
            self.num_bytes = _KEPT * self.num_bytes + num_bytes
            self.seconds = _KEPT * self.seconds + max(seconds, 1e-9)
        self.begun = True

    @property
    def value(self) -> float | None:
        return self.num_bytes / self.seconds if self.seconds else None


@dataclass
class _Link:
    """What is known of the way from one process; `plain` and `coded` are in bytes of pages."""

    plain: _Rate = field(default_factory=_Rate)
    coded: _Rate = field(default_factory=_Rate)
    coding: Coding | None = None
    book: Codebook | None = None
    book_digest: str = ""
    count: int = 0
    avoided: float = 0.0
    told: bool = False


class Links:
    """The ways to a process from others, by any name. Thread-safe.

    Args:
        setting: `cluster.codec`.
        codecs: that can be decoded here.
        clock: seconds, from any start.
    """

    def __init__(
        self,
        setting: KvCodec,
        codecs: list[str],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._setting = setting
        self._codecs = codecs
        self._clock = clock
        self._lock = threading.Lock()
        self._links: dict[str, _Link] = {}
        self._decode = _Rate()

    def wanted(
        self, name: str, pages: int, page_bytes: int, *, piped: bool = True
    ) -> Wanted | None:
        """How to ask for pages; None where nothing can be decoded here.

        Args:
            name: of the way.
            pages: that are asked for.
            page_bytes: of each, as they are.
            piped: whether pages are on their way while others are coded.
        """
        if not self._codecs:
            return None
        with self._lock:
            link = self._links.setdefault(name, _Link())
            link.count += 1
            coded = self._setting != "auto" or self._pays(link, pages, page_bytes, piped)
            coded = coded and self._clock() >= link.avoided
            return Wanted(self._codecs, coded, link.book_digest)

    def heard(self, name: str, coding: Coding | None) -> None:
        """What a process codes by, of what can be decoded here."""
        with self._lock:
            link = self._links.setdefault(name, _Link())
            link.coding = coding
            told, link.told = link.told, link.told or coding is None
        if coding is None and not told and self._codecs and self._setting != "auto":
            logger.warning(
                "%s sends pages as they are, though cluster.codec is %s here: set it to the same "
                "for all",
                name,
                self._setting,
            )

    def book(self, name: str, coding: Coding) -> Codebook | None:
        """The codebook that a process codes by, if it has sent it before."""
        with self._lock:
            link = self._links.setdefault(name, _Link())
            return link.book if link.book_digest == coding.book else None

    def keep_book(self, name: str, coding: Coding, book: Codebook) -> None:
        """Keeps the codebook that a process has sent along."""
        with self._lock:
            link = self._links.setdefault(name, _Link())
            link.book, link.book_digest = book, coding.book

    def measured(
        self, name: str, num_bytes: int, seconds: float, coded: bool, decoding: float = 0.0
    ) -> None:
        """A transfer has come.

        Args:
            name: of the way.
            num_bytes: of its pages, as they are.
            seconds: that it took.
            coded: whether it was coded; `decoding` it took so many seconds of these.
            decoding: see above.
        """
        if num_bytes < LEAST_BYTES:
            return
        with self._lock:
            link = self._links.setdefault(name, _Link())
            (link.coded if coded else link.plain).add(num_bytes, seconds)
            if coded:
                self._decode.add(num_bytes, decoding)

    def failed(self, name: str) -> None:
        """What came coded was not what it should be."""
        with self._lock:
            link = self._links.setdefault(name, _Link())
            link.avoided = self._clock() + AVOID_SECONDS
            link.book, link.book_digest = None, ""

    def _pays(self, link: _Link, pages: int, page_bytes: int, piped: bool) -> bool:
        plain, coded, coding = link.plain.value, link.coded.value, link.coding
        if plain is None or coding is None:
            return False
        decode = self._decode.value or coding.decode
        least = price(pages, page_bytes, plain, coding, decode, piped=piped)
        by_price = least < MARGIN * pages * page_bytes / plain
        if coded is None:
            return by_price
        better = coded * MARGIN > plain
        # The price says where the other way is hopeless.
        return not better if link.count % TRY_AGAIN == 0 and (better or by_price) else better


def price(
    pages: int, page_bytes: int, link: float, coding: Coding, decode: float, *, piped: bool
) -> float:
    """Seconds that a coded transfer takes.

    Args:
        pages: of it.
        page_bytes: of each, as they are.
        link: bytes a second.
        coding: of who sends.
        decode: bytes of pages that are decoded here a second.
        piped: whether pages are on their way while others are coded.
    """
    steps = page_bytes / coding.encode, page_bytes / (coding.ratio * link), page_bytes / decode
    return sum(steps) + (pages - 1) * (max(steps) if piped else sum(steps))
