"""Connectors: how pages get from the pool of one worker into that of another.

The receiving side asks for pages, the sending side puts them on offer, and the receiving side pulls
them; nothing is pushed. A transfer has a random id that is never used again. A page is written
into the pool only if it is the page that was asked for, with the contents that were offered.

Each worker has one end of a connector. All ends are tested by the same suite.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from pshare_jax.core.messages import PageDescriptor
from pshare_jax.core.plans import Offer, Pull


class TransferError(Exception):
    """A transfer has failed; nothing of it may be read. Says which page, and why."""


class TransferState(Enum):
    """How far a transfer that was accepted has got."""

    ARRIVING = "arriving"
    READY = "ready"


class Connector(Protocol):
    """One worker's end. All methods belong to the thread that owns the worker's pool."""

    def offer(self, offer: Offer) -> list[PageDescriptor]:
        """Sending side: puts pages of the pool on offer, until pulled or aborted.

        Returns:
            What each page holds.

        Raises:
            TransferError: they cannot be offered.
        """
        ...

    def address_of(self, transfer: int) -> str:
        """Sending side: where other processes find what it offers; empty where all are in one."""
        ...

    def accept(self, pull: Pull) -> None:
        """Receiving side: begins to pull the pages of a transfer.

        Raises:
            TransferError: they are not on offer, or not those that were asked for.
        """
        ...

    def poll(self, transfer: int) -> TransferState:
        """Whether all pages of an accepted transfer are there. Does not block.

        Raises:
            TransferError: no such transfer was accepted, or it has failed.
        """
        ...

    def commit(self, transfer: int) -> None:
        """Writes the pages of a transfer that is ready into the pool, and ends it.

        Raises:
            TransferError: contents that are not those offered, or no such transfer.
        """
        ...

    def abort(self, transfer: int) -> None:
        """Either side: forgets a transfer. Unknown ones are ignored."""
        ...


def check_descriptors(pull: Pull, expected: PageDescriptor) -> None:
    """Checks that the pages on offer are those that were asked for.

    Args:
        pull: with the descriptors, and the keys that were asked for.
        expected: what every page of the receiving pool looks like, of any key and contents.

    Raises:
        TransferError: names the page and what is different.
    """
    if len(pull.descriptors) != len(pull.keys):
        raise TransferError(
            f"transfer {pull.transfer}: {len(pull.descriptors)} pages are on offer, "
            f"{len(pull.keys)} were asked for"
        )
    for number, (found, key) in enumerate(zip(pull.descriptors, pull.keys, strict=True)):
        where = f"transfer {pull.transfer}, page {number}"
        if found.key != key:
            raise TransferError(f"{where}: key {found.key.hex()} is on offer, not {key.hex()}")
        for name in ("layers", "shape", "dtype", "codec"):
            there, wanted = getattr(found, name), getattr(expected, name)
            if there != wanted:
                raise TransferError(f"{where}: {name} is {there}, but this pool has {wanted}")
