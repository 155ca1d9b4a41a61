"""Two processes that move coded pages, in one: what offers them, and what reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pshare_jax.core.connector import TransferState
from pshare_jax.core.plans import Offer, Pull
from pshare_jax.kv.coding import (
    Coding,
    PageCoder,
)
from pshare_jax.kv.direct import DirectOffers
from pshare_jax.kv.offers import OfferFolder
from pshare_jax.kv.peers import Claimed, Peers
from pshare_jax.kv.remote import RemotePages
from pshare_jax.kv.ways import Way
from pshare_jax.runtime.layout import PageLayout
from pshare_jax.runtime.pool import PagePool
from pshare_jax.runtime.programs import Programs
from tests.engine.harness import wait_until
from tests.helpers import tiny_config

NUM_PAGES = 80
CONFIG = tiny_config()
LAYOUT = PageLayout.of(CONFIG, 8, jnp.bfloat16)
SHAPE = (LAYOUT.num_layers, *LAYOUT.layer_shape(1)[1:])
PAGE_BYTES = LAYOUT.bytes_per_page
WAYS: tuple[Way, ...] = ("http", "jax-transfer")


def realistic(seed: int, count: int = NUM_PAGES) -> np.ndarray:
    """Bits of pages `[L, n, ...]` whose values' sizes go by their channels."""
    rng = np.random.default_rng(seed)
    sizes = np.random.default_rng(7).lognormal(0, 2, (SHAPE[0], 1, *SHAPE[1:3], 1, SHAPE[4]))
    values = rng.normal(0, 1, (SHAPE[0], count, *SHAPE[1:])) * sizes
    return values.astype(jnp.bfloat16).view(np.uint16)


@dataclass
class Server:
    """A process that has pages on offer; `mangle` changes what it sends of coded ones."""

    url: str
    folder: Path
    coder: PageCoder | None = None
    direct: DirectOffers | None = None
    mangle: Callable[[list[bytes]], list[bytes]] | None = None
    header: Callable[[Coding], str] = field(default=lambda coding: coding.header())
    claimed: Callable[[Claimed], Claimed] = field(default=lambda claimed: claimed)


class Pair:
    """Two processes: one has pages on offer, the other one reads them into its pool."""

    def __init__(
        self,
        way: Way,
        programs: list[Programs],
        server: Server,
        direct: list[DirectOffers],
        folder: Path,
        codecs: tuple[str, str] = ("planes", "planes"),
    ):
        self.way = way
        self.server = server
        sends, _ = codecs
        self.pools = [PagePool(LAYOUT, NUM_PAGES, own.pool_sharding) for own in programs]
        for pool in self.pools:
            pool.own()
        self.folders = [OfferFolder(server.folder), OfferFolder(folder)]
        mine = direct if way == "jax-transfer" else [None, None]
        how: Any = way if way == "jax-transfer" else "auto"
        self.sender, self.reader = (
            RemotePages(name, own, pool, offers, server.url, Peers(), one, how, codec)
            for name, own, pool, offers, one, codec in zip(
                ("prefill0", "decode0"), programs, self.pools, self.folders, mine, codecs,
                strict=True,
            )
        )  # fmt: skip
        self._coder = PageCoder(sends, SHAPE, "bfloat16")  # type: ignore[arg-type]
        self._direct = direct[0]
        self._transfer = np.random.default_rng().integers(1, 1 << 60)
        self.serve()

    def serve(self) -> None:
        """Has the server code as this one's sender does; there may be several pairs."""
        self.server.coder, self.server.direct = self._coder, self._direct
        self._direct.code_by(self._coder, self.sender.records)

    def fill(self, bits: np.ndarray) -> None:
        """Fills the sender's pool with pages `[L, n, ...]` from page 1 on."""
        shape = (SHAPE[0], NUM_PAGES + 1, *SHAPE[1:])
        values = np.zeros(shape, np.uint16)
        values[:, 1 : 1 + bits.shape[1]] = bits
        layers = [jax.device_put(v.view(jnp.bfloat16)[:NUM_PAGES]) for v in values]
        sharding = self.sender._programs.pool_sharding
        self.pools[0].update(lambda _: (tuple(jax.device_put(v, sharding) for v in layers), None))

    def bits(self) -> np.ndarray:
        """What the reader's pool holds from page 1 on."""
        pages = self.pools[1].read(lambda pages: np.stack([np.asarray(page) for page in pages]))
        return pages[:, 1:].view(np.uint16)

    def offer(self, count: int) -> Pull:
        self._transfer += 1
        transfer = int(self._transfer)
        keys = [b"key %d" % page for page in range(count)]
        reader = self.reader.reader("prefill0")
        pages = [*range(1, 1 + count)]
        descriptors = self.sender.offer(Offer(transfer, "decode0", pages, keys, reader))
        address = self.sender.address_of(transfer)
        assert self.way in address
        return Pull(transfer, "prefill0", descriptors, keys, pages, address)

    def move(self, count: int) -> None:
        pull = self.offer(count)
        self.reader.accept(pull)
        wait_until(lambda: self.reader.poll(pull.transfer) is TransferState.READY)
        self.reader.commit(pull.transfer)

    def bytes_of(self, codec: str) -> tuple[int, int]:
        """That have come by the way, coded so: as pages, and on the wire."""
        traffic = self.reader.traffic
        return traffic.raw[self.way, codec], traffic.wire[self.way, codec]

    def close(self) -> None:
        for end in (self.sender, self.reader):
            end.close()
        for folder in self.folders:
            folder.close()
