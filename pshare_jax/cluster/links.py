"""All links of a frontend, in a thread of their own: which workers there are, and the way there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import aiohttp

from pshare_jax.cluster import wire
from pshare_jax.cluster.discovery import LOOK_SECONDS, Discovery
from pshare_jax.cluster.link import Link, LinkLostError, LinkTimes
from pshare_jax.cluster.looks import SeenPools
from pshare_jax.core.messages import DISPATCHER, Lend, Message, NotOffered
from pshare_jax.core.pages.sharing_map import PoolView
from pshare_jax.core.stats import EngineStats, together

logger = logging.getLogger(__name__)

TLS_CLOSE_SECONDS = 0.25

MAX_RETAINED = 64
"""Lost processes that may yet come again; of others only the sum is kept."""


class Links:
    """Links to worker processes. Methods are for any thread; callbacks come from its own.

    Args:
        addresses: `HOST:PORT` of each worker process, and names that stand for some: see
            `cluster.discovery`.
        hello: who we are.
        token: that the processes of the cluster know each other by.
        tls: who we are and whom we believe; None is plain HTTP.
        times: how patient links are.
        on_join: called with a worker that has come.
        on_message: called with the worker and its message to the dispatcher.
        on_load: called with a worker's name and what others have sent there.
        on_drain: called with the name of a worker that wants to go.
        on_lost: called with a worker's name and why it is lost.
        may_pass: whether a message of one worker to another is still of use.
        on_modules: called with what a worker says of modules that have come at run time.
        each_beat: called about as often as workers beat.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        hello: wire.Hello,
        token: str,
        tls: ssl.SSLContext | None,
        times: LinkTimes,
        *,
        on_join: Callable[[wire.Part], None],
        on_message: Callable[[str, Message], None],
        on_load: Callable[[str, int], None],
        on_drain: Callable[[str], None],
        on_lost: Callable[[str, str], None],
        may_pass: Callable[[str, Message], bool],
        on_modules: Callable[[wire.Hosting | wire.Modules], None],
        each_beat: Callable[[], None],
    ):
        def link(address: str) -> Link:
            return Link(address, hello, token, tls, times, self._joined, self._heard, self._lost)

        self._new_link = link
        # Replaced as a whole: other threads read it.
        self._discovery = Discovery(addresses)
        self._links = [link(address) for address in dict.fromkeys(self._discovery.fixed)]
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._session: aiohttp.ClientSession | None = None
        self._times = times
        self._tls = tls
        self._on_join = on_join
        self._on_message = on_message
        self._on_load = on_load
        self._on_drain = on_drain
        self._on_lost = on_lost
        self._may_pass = may_pass
        self._on_modules = on_modules
        self._each_beat = each_beat
        self._pools = SeenPools()
        self._link_of: dict[str, Link] = {}
        self._ended_stats = EngineStats()
        self._retained: OrderedDict[str, EngineStats] = OrderedDict()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="links", daemon=True)
        self._loop = asyncio.new_event_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()

    def start(self) -> None:
        """Begins to link."""
        self._thread.start()

    def stop(self) -> None:
        """Ends all links."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end)
            self._thread.join()

    def send(self, source: str, to: str, message: Message) -> None:
        """Carries a message to a worker; to one that is not there it is lost."""
        link = self._link_of.get(to)
        if link is not None:
            link.send(wire.Carry(source, to, message))

    def tell(self, frame: wire.Load | wire.Retired | wire.Modules, worker: str = "") -> None:
        """Sends a frame to the process of a worker, or to all processes."""
        if worker:
            link = self._link_of.get(worker)
            links = [] if link is None else [link]
        else:
            links = self._links
        for link in links:
            link.send(frame)

    def left(self, worker: str) -> None:
        """Tells a worker that wants to go that nothing needs its process any more."""
        link = self._link_of.get(worker)
        if link is not None:
            link.send(wire.Left())

    def parts_of(self, worker: str) -> list[str]:
        """Names of the workers of the same process."""
        link = self._link_of.get(worker)
        return [name for name, other in tuple(self._link_of.items()) if other is link]

    def set_addresses(self, addresses: Sequence[str]) -> None:
        """Links to these worker processes from now on, and to no others; returns at once.

        Who is not named any more is lost at once, also if it is linked.
        """
        with contextlib.suppress(RuntimeError):  # the loop is closed: all have ended
            self._loop.call_soon_threadsafe(self._take, addresses)

    def states(self) -> dict[str, str]:
        """All addresses, and why there is no link; empty where there is one."""
        links = {link.address: "" if link.welcome else link.why for link in self._links}
        return {**links, **self._discovery.problems}

    def missing(self) -> dict[str, str]:
        """Addresses without a link, and why."""
        return {address: why for address, why in self.states().items() if why}

    def stats(self) -> list[EngineStats]:
        """What the worker processes have last said that they have done, those that ended too."""
        with self._lock:
            retained = dict(self._retained)
            found = [self._ended_stats]
        for link in self._links:
            welcome, last = link.welcome, link.last
            if welcome is not None and last is not None:
                # One that was lost and has come again has not begun anew.
                retained.pop(welcome.incarnation, None)
                found.append(last.stats)
        return [*found, *retained.values()]

    def pools(self) -> list[PoolView]:
        """What the workers' pools hold, as they said last; asks them, for the next time."""
        for link in self._links:
            if link.welcome is not None and (seen := self._pools.ask(link.address)) is not None:
                link.send(wire.Look(seen))
        return self._pools.views()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._main())
        finally:
            self._loop.close()

    async def _main(self) -> None:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as self._session:
            for link in self._links:
                self._begin(link, self._session)
            others = [asyncio.create_task(self._beat()), asyncio.create_task(self._discover())]
            try:
                await self._ended
            finally:
                tasks = [*others, *self._tasks.values()]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        if self._tls is not None:
            # Connections of TLS are closed by callbacks that nobody can wait for.
            await asyncio.sleep(TLS_CLOSE_SECONDS)

    def _begin(self, link: Link, session: aiohttp.ClientSession) -> None:
        self._tasks[link.address] = asyncio.create_task(link.run(session))

    async def _discover(self) -> None:
        """Finds who has come and gone, where names stand for workers."""
        while True:
            discovery = self._discovery
            if not discovery.static:
                linked = {link.address for link in self._links if link.welcome is not None}
                found = await discovery.look(linked)
                if discovery is self._discovery and found != [one.address for one in self._links]:
                    self._change(found)
            await asyncio.sleep(LOOK_SECONDS)

    def _take(self, addresses: Sequence[str]) -> None:
        self._discovery = Discovery(addresses)
        if self._discovery.static:
            self._change(list(dict.fromkeys(addresses)))

    def _change(self, addresses: list[str]) -> None:
        """Takes other addresses: first those go that are not wanted, since who comes may have the
        name of one of them."""
        links = {link.address: link for link in self._links}
        for address in links.keys() - set(addresses):
            links[address].cut("it is no worker of this cluster any more")
            if (task := self._tasks.pop(address, None)) is not None:
                task.cancel()
        self._links = [links.get(address) or self._new_link(address) for address in addresses]
        if self._session is None or self._ended.done():
            return
        for link in self._links:
            if link.address not in self._tasks:
                self._begin(link, self._session)

    def _end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._times.beat_seconds)
            self._each_beat()

    def _joined(self, link: Link) -> None:
        assert link.welcome is not None
        self._check(link, link.welcome)
        logger.info(
            "linked to %s: %s", link.address, ", ".join(p.info.name for p in link.welcome.parts)
        )
        # First, so that nobody is asked for what has been replaced meanwhile.
        self._on_modules(wire.Modules(link.welcome.modules))
        for part in link.welcome.parts:
            self._link_of[part.info.name] = link
            self._on_join(part)

    def _check(self, link: Link, welcome: wire.Welcome) -> None:
        """Checks that a worker process goes with the others.

        Raises:
            LinkLostError: says why not.
        """
        for name, other in self._link_of.items():
            if any(part.info.name == name for part in welcome.parts):
                raise LinkLostError(
                    f"it calls itself {name}, as {other.address} does: give each worker process a "
                    "name of its own"
                )
            if other.welcome is not None and other.welcome.dtype != welcome.dtype:
                raise LinkLostError(
                    f"its pages are {welcome.dtype}, those of {other.address} are "
                    f"{other.welcome.dtype}: set `dtype` to the same for all"
                )

    def _lost(self, link: Link, reason: str) -> None:
        if link.last is not None and link.welcome is not None:
            with self._lock:
                self._retained[link.welcome.incarnation] = _counters(link.last.stats)
                if len(self._retained) > MAX_RETAINED:
                    _, oldest = self._retained.popitem(last=False)
                    self._ended_stats = together([self._ended_stats, oldest])
        self._pools.lose(link.address)
        for name in [name for name, other in self._link_of.items() if other is link]:
            del self._link_of[name]
            self._on_lost(name, reason)

    def _heard(self, link: Link, frame: wire.Frame) -> None:
        match frame:
            case wire.Carry(source, to, message) if self._link_of.get(source) is link:
                if to == DISPATCHER:
                    self._on_message(source, message)
                elif isinstance(message, Lend) and to not in self._link_of:
                    # Who asks waits for an answer; nobody else would give one.
                    why = f"{to} is not here"
                    self.send(to, source, NotOffered(message.transfer, why, message.id))
                elif self._may_pass(source, message):
                    self.send(source, to, message)
            case wire.Beat(_, _, others):
                for name, load in others.items():
                    if self._link_of.get(name) is link:
                        self._on_load(name, load)
            case wire.Hosting() | wire.Modules():
                self._on_modules(frame)
            case wire.Pools(number, data):
                self._pools.hear(link.address, number, data)
            case wire.Draining():
                for name, other in tuple(self._link_of.items()):
                    if other is link:
                        self._on_drain(name)
            case _:
                logger.warning("%s says what only frontends say: %s", link.address, frame)


def _counters(stats: EngineStats) -> EngineStats:
    """What of a process that has ended still counts."""
    return EngineStats(
        prefill_tokens=stats.prefill_tokens,
        ahead_tokens=stats.ahead_tokens,
        foreseen_tokens=stats.foreseen_tokens,
        generation_tokens=stats.generation_tokens,
        forced_tokens=stats.forced_tokens,
        handoff_bytes=stats.handoff_bytes,
        handoff_pages=stats.handoff_pages,
        failed_transfers=stats.failed_transfers,
        preemptions=stats.preemptions,
        decode_pages=stats.decode_pages,
        compiles=stats.compiles,
        busy_seconds=stats.busy_seconds,
        store=stats.store,
        transfers=stats.transfers,
        transfer_bytes=stats.transfer_bytes,
        miscoded=stats.miscoded,
        borrowed_tokens=stats.borrowed_tokens,
        unasked=stats.unasked,
        tiers={name: tier.of_the_dead() for name, tier in stats.tiers.items()},
    )
