"""Pages that the workers of a process give to others, and get: what is on offer, and their ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np

from pshare_jax.cluster.thread import WorkerThread
from pshare_jax.cluster.worker import DecodeWorker
from pshare_jax.config import Role, ServeConfig
from pshare_jax.core.connector import Connector, TransferError
from pshare_jax.core.messages import Fetch, Lend, Message, Release, offered_by
from pshare_jax.core.stats import EngineStats
from pshare_jax.engine.kv_store import page_shape
from pshare_jax.kv.coding import PageCoder
from pshare_jax.kv.direct import DirectOffers
from pshare_jax.kv.offers import OfferFolder
from pshare_jax.kv.peers import Peers
from pshare_jax.kv.remote import RemotePages
from pshare_jax.runtime.layout import PageLayout
from pshare_jax.runtime.pool import PagePool
from pshare_jax.runtime.programs import Programs

logger = logging.getLogger(__name__)


class HostedPages:
    """Moves pages between a process's pools and those of others.

    Args:
        config: the serving configuration, the same in all processes.
        role: what the process does.
        layout: of its pages.
        mesh_size: devices of its mesh.
        url: where other hosts get pages that are on offer here; empty is nowhere.
        peers: asks other worker processes; None does so without a secret.
        host: address of this process, for what it offers by `jax.experimental.transfer`.

    Attributes:
        offers: what is on offer as files.
        direct: what is on offer by `jax.experimental.transfer`; None is nothing.
        coder: codes pages for other hosts.
        ends: of workers, by name.

    Raises:
        ConfigError: there can be no files, or no such codes of these pages.
    """

    def __init__(
        self,
        config: ServeConfig,
        role: Role,
        layout: PageLayout,
        mesh_size: int,
        url: str,
        peers: Peers | None,
        host: str,
    ):
        self.coder = PageCoder(
            config.cluster.codec, page_shape(layout), np.dtype(layout.dtype).name
        )
        self.offers = OfferFolder(config.cluster.shm_path)
        # A pair over one pool moves nothing.
        self.direct = None if role == "both" else _direct(config, host, mesh_size)
        self.ends: dict[str, RemotePages] = {}
        self._cluster = config.cluster
        self._url = url
        self._peers = peers or Peers()

    def new_end(self, name: str, programs: Programs, pool: PagePool) -> Connector:
        """The end of a worker."""
        ways = self._cluster.transport, self._cluster.codec
        end = RemotePages(
            name, programs, pool, self.offers, self._url, self._peers, self.direct, *ways
        )
        if self.direct is not None:
            self.direct.code_by(self.coder, end.records)
        self.ends[name] = end
        return end

    def warm_up(self) -> None:
        """Compiles what coded pages need, before anything else runs."""
        for end in self.ends.values():
            if self.direct is not None and end.records is not None:
                end.records.warm_up(sends=True, receives=True)

    def listen(self, workers: Iterable[DecodeWorker[Any]], thread: WorkerThread) -> None:
        """Has the thread of decode workers look at what has come, and wakes it for that."""
        for worker in workers:
            if (end := self.ends.get(worker.name)) is not None:
                worker.arrived = end.has_arrived
        for end in self.ends.values():
            end.on_arrival = thread.wake

    def addressed(self, source: str, to: str, message: Message) -> Message:
        """A message of a worker to another one, which learns how its author reads pages."""
        if isinstance(message, Fetch | Lend):
            # Of one process are only those that share a pool, and fetch nothing.
            return msgspec.structs.replace(message, reader=self.ends[source].reader(to))
        if isinstance(message, Release) and source in self.ends:
            reader = self.ends[source].reader(to)
            return msgspec.structs.replace(message, worker=source, reader=reader)
        return message

    def read_ahead(self, message: Message) -> None:
        """Begins to read what a message says is on offer, before a worker hears it."""
        if (offered := offered_by(message)) is not None:
            for end in self.ends.values():
                end.read_ahead(offered.transfer, offered.address, len(offered.descriptors))

    def expire(self) -> None:
        """Takes back what nobody has taken for too long."""
        self.offers.expire(time.monotonic())
        if self.direct is not None:
            self.direct.expire()

    def stats(self) -> EngineStats:
        """What has come, and how; nothing of anything else."""
        return EngineStats(
            transfers={
                (name, way): count
                for name, end in self.ends.items()
                for way, count in end.moved.items()
                if count
            },
            transfer_bytes={
                (name, way, codec, kind): count
                for name, end in self.ends.items()
                for kind, counter in (("raw", end.traffic.raw), ("wire", end.traffic.wire))
                for (way, codec), count in dict(counter).items()
            },
            miscoded={
                (name, reason): count
                for name, end in self.ends.items()
                for reason, count in dict(end.traffic.refused).items()
            },
        )

    def close(self) -> None:
        """Reads nothing more, and takes back what is on offer."""
        for end in self.ends.values():
            end.close()
        self.offers.close()


def _direct(config: ServeConfig, host: str, mesh_size: int) -> DirectOffers | None:
    """What is offered by `jax.experimental.transfer`, if that is wanted and can be."""
    if config.cluster.transport != "jax-transfer":
        return None
    if mesh_size > 1:
        logger.warning("cluster.transport: jax-transfer is for meshes of one device; as `auto`")
        return None
    try:
        return DirectOffers(host)
    except TransferError as error:
        logger.warning("cluster.transport: %s; as `auto`", error)
        return None
