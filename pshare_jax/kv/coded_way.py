"""What a process has been told of pages that come coded by one way, and what of it is believed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pshare_jax.kernels.kv_codec.codebook import Codebook
from pshare_jax.kv.coding import Coding, CodingError, Wanted, read_book, table_shape
from pshare_jax.kv.links import Links
from pshare_jax.kv.traffic import Traffic


class CodedWay:
    """Codebooks of those who send by one way, and what is done about wrong ones. Thread-safe.

    Args:
        shape: of a page, `[L, 2, kv_heads, page_size, head_dim]`.
        links: knows whether pages had better come coded, and keeps codebooks.
        traffic: counts what has come.
    """

    def __init__(self, shape: Sequence[int], links: Links, traffic: Traffic):
        self.links = links
        self.traffic = traffic
        self._shape = tuple(shape)

    def refuse(self, url: str, reason: str) -> None:
        """What came coded was not what it should be: for a while nothing comes so from there."""
        self.traffic.refuse(reason)
        self.links.failed(url)

    def codebook(
        self,
        transfer: int,
        url: str,
        coding: Coding,
        wanted: Wanted | None,
        table: Callable[[int], bytes],
    ) -> Codebook:
        """The codebook of an answer whose pages are coded.

        Args:
            transfer: its id, for errors.
            url: of who sends.
            coding: what the answer says.
            wanted: what was asked for.
            table: gives so many bytes, in which the codebook has come; called where it has.

        Raises:
            CodingError: nobody has asked for this codec, or the codebook has not come, or came as
                another one.
        """
        where = f"transfer {transfer}"
        if wanted is None or not wanted.coded or coding.codec not in wanted.codecs:
            raise CodingError("codec", f"{where}: it comes as {coding.codec}, unasked")
        if coding.table:
            size = int(np.prod(table_shape(coding.codec, self._shape)))
            book = read_book(coding, table(size), self._shape)
            self.links.keep_book(url, coding, book)
            return book
        kept = self.links.book(url, coding)
        if kept is None:
            raise CodingError("book", f"{where}: codebook {coding.book} has not been sent")
        return kept
