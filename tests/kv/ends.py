"""Both ends of a connector, of any kind, and what their pools hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pshare_jax.config import DecodeConfig
from pshare_jax.core.connector import TransferState
from pshare_jax.core.plans import Offer, Pull
from pshare_jax.kernels.backends import on_mesh
from pshare_jax.kv.direct import DirectOffers
from pshare_jax.kv.local import DevicePut, Exchange, SamePool
from pshare_jax.kv.offers import OfferFolder, file_of
from pshare_jax.kv.peers import Peers
from pshare_jax.kv.remote import RemotePages
from pshare_jax.runtime.layout import PageLayout
from pshare_jax.runtime.pool import PagePool
from pshare_jax.runtime.programs import Programs
from pshare_jax.runtime.steps import StepSpec
from tests.cluster.harness import TOKEN
from tests.engine.harness import wait_until
from tests.helpers import tiny_config

NUM_PAGES = 160
CONFIG = tiny_config()
LAYOUT = PageLayout.of(CONFIG, 8, jnp.float32)


def programs_of(mesh: Mesh) -> Programs:
    decode = DecodeConfig(max_num_seqs=2, batch_buckets=[1])
    spec = StepSpec(CONFIG, on_mesh("xla", mesh.size), mesh)
    return Programs(spec, LAYOUT, mesh, 64, [8], decode)


def contents_of(pool: PagePool) -> np.ndarray:
    """All pages, `[layers, pages, ...]`; page 0 takes the writes of padding."""
    return pool.read(lambda pages: np.stack([np.asarray(p) for p in pages]))[:, 1:]


def fill(programs: Programs, pool: PagePool, seed: int) -> None:
    shape = (LAYOUT.num_layers, *LAYOUT.layer_shape(NUM_PAGES))
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    pool.update(lambda _: (tuple(jax.device_put(v, programs.pool_sharding) for v in values), None))


class Link:
    """A sending and a receiving end, and what both pools hold.

    `exchange` is what the sending end has on offer; a receiver of another process takes from it
    only what it then reads, so that withdrawing the rest is the sender's.
    """

    def __init__(
        self,
        kind: str,
        programs: list[Programs],
        folder: Path | None = None,
        url: str = "",
        direct: list[DirectOffers] | None = None,
    ):
        self.kind = kind
        pools = [PagePool(LAYOUT, NUM_PAGES, p.pool_sharding) for p in programs]
        for seed, (own, pool) in enumerate(zip(programs, pools, strict=True)):
            pool.own()
            fill(own, pool, seed)
        self.remote = folder is not None
        self._folders: list[OfferFolder] = []
        names = ("prefill0", "decode0")
        ends: list[Any] = []
        if folder is None:
            exchange = Exchange()
            self.exchange: Any = exchange
            end = DevicePut if kind == "device_put" else SamePool
            for name, own, pool in zip(names, programs, pools, strict=False):
                ends.append(end(name, own, pool, exchange))
        else:
            for i, (name, own, pool) in enumerate(zip(names, programs, pools, strict=True)):
                # Another parent is another host.
                parent = folder if kind == "shm" else folder / name
                parent.mkdir(exist_ok=True)
                self._folders.append(OfferFolder(parent))
                mine: Any = (direct[i], "jax-transfer") if direct else (None, "auto")
                ends.append(
                    RemotePages(name, own, pool, self._folders[-1], url, Peers(TOKEN), *mine)
                )
            self.exchange = direct[0] if direct else self._folders[0]
        self.sender, self.receiver = ends[0], ends[-1]
        self.source, self.target = pools[0], pools[-1]
        self.moves = kind != "same-mesh"
        self._next = 0

    def close(self) -> None:
        if self.remote:
            self.sender.close()
            self.receiver.close()
        for folder in self._folders:
            folder.close()

    def withdraw(self) -> None:
        """What a sender of another process hears when a sequence was given up."""
        if self.remote:
            for transfer in range(self._next + 1):
                self.sender.abort(transfer)

    def pull(self, transfer: int) -> Pull:
        return Pull(transfer, "prefill0", [], [], [], self.sender.address_of(transfer))

    def offer(self, pages: list[int]) -> Pull:
        """Offers pages; the pull asks for them, into pages 81 and on."""
        self._next += 1
        keys = [b"key %d" % page for page in pages]
        reader = self.receiver.reader("prefill0") if self.remote else ""
        descriptors = self.sender.offer(Offer(self._next, "decode0", pages, keys, reader))
        targets = [81 + i for i in range(len(pages))]
        address = self.sender.address_of(self._next)
        return Pull(self._next, "prefill0", descriptors, keys, targets, address)

    def flip(self, transfer: int, page: int, count: int) -> None:
        """Flips the lowest bit of one value of one page of the `count` that are on offer."""
        if isinstance(self.exchange, DirectOffers):
            pieces = list(self.exchange._offers[transfer].pieces)
            piece = np.array(pieces[page // 16])
            piece.view(np.uint32)[1, page % 16, 1, 0, 3, 5] ^= 1
            pieces[page // 16] = jax.device_put(piece, pieces[page // 16].sharding)
            offer = replace(self.exchange._offers[transfer], pieces=pieces)
            self.exchange._offers[transfer] = offer
            return
        if self.remote:
            size = LAYOUT.bytes_per_page // LAYOUT.num_layers
            piece, inside = divmod(page, 16)
            length = min(16, count - 16 * piece)
            at = LAYOUT.bytes_per_page * 16 * piece + size * (length + inside) + 8
            file = file_of(self.exchange.path, transfer)
            data = bytearray(file.read_bytes())
            data[at] ^= 1
            file.write_bytes(data)
            return
        offer = self.exchange._offers[transfer]
        piece = np.array(offer.staged[page // 16])
        bits = piece.view(np.uint32)
        bits[1, page % 16, 1, 0, 3, 5] ^= 1
        offer.staged[page // 16] = jax.device_put(piece, offer.staged[page // 16].sharding)

    def move(self, pull: Pull) -> None:
        self.receiver.accept(pull)
        wait_until(lambda: self.receiver.poll(pull.transfer) is TransferState.READY)
        self.receiver.commit(pull.transfer)
