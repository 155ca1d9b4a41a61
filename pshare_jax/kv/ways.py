"""Ways from worker to worker for pages, and how who offers them chooses one for who reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from pshare_jax.config import Transport
from pshare_jax.core.connector import TransferError
from pshare_jax.kv.offers import PREFIX

Way = Literal["shm", "http", "jax-transfer"]


class Reader(msgspec.Struct, frozen=True):
    """Who asks for pages, as who offers them is told.

    Args:
        folder: of its own offers, which exists for those on its host alone.
        direct: whether it would pull by `jax.experimental.transfer`.
    """

    folder: str
    direct: bool = False

    def encode(self) -> str:
        """As text, for messages."""
        return msgspec.json.encode(self).decode()


class Address(msgspec.Struct, frozen=True):
    """Where the pages of one transfer are on offer.

    Args:
        worker: who offers them.
        way: how they are to be had.
        folder: with the file of the transfer, for those on the same host.
        url: of the process, for others.
    """

    worker: str
    way: Way
    folder: str
    url: str

    def encode(self) -> str:
        """As text, for messages."""
        return msgspec.json.encode(self).decode()


def is_here(folder: str, own: Path) -> bool:
    """Whether a folder of offers is on the host of another one.

    Its name is its owner's word: a folder of offers it must be, and lie where ours does.
    """
    path = Path(folder)
    return path.name.startswith(PREFIX) and path.parent == own.parent and path.exists()


def choose(transport: Transport, reader: str, own: Path, *, direct: bool) -> Way:
    """The way for pages that `reader` has asked for.

    Args:
        transport: `cluster.transport` of who offers them.
        reader: an encoded `Reader`; empty is one that says nothing of itself, and reads files.
        own: folder of the offers.
        direct: whether who offers them could be pulled from by `jax.experimental.transfer`.

    Raises:
        TransferError: they are on another host, and `transport` allows no way there.
    """
    asks = Reader("")
    if reader:
        try:
            asks = msgspec.json.decode(reader, type=Reader)
        except msgspec.DecodeError:
            raise TransferError(f"{reader!r} is no reader") from None
    if transport == "jax-transfer" and direct and asks.direct:
        return "jax-transfer"
    if transport == "http":
        return "http"
    if not asks.folder or is_here(asks.folder, own):
        return "shm"
    if transport == "shm":
        raise TransferError(
            "who asks for the pages is on another host, and cluster.transport is `shm`"
        )
    return "http"
