"""A worker process's side of its links: frontends come, have sequences computed, and go or die.

The thread that hosts the workers knows parts by name only. Here their messages find the frontend
whose sequence they are about: ids say whose they are. When a link ends, all that its frontend had
here is given up, so that nothing is held for the dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
from aiohttp import WSMsgType, web

from pshare_jax.cluster import wire
from pshare_jax.cluster.looks import PoolLooks
from pshare_jax.cluster.outbox import FrameQueue
from pshare_jax.cluster.station_modules import StationModules
from pshare_jax.cluster.thread import WorkerThread
from pshare_jax.core import messages as m
from pshare_jax.core.messages import DISPATCHER, Message
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.pages.sharing_map import PoolView
from pshare_jax.core.stats import EngineStats

logger = logging.getLogger(__name__)

HELLO_SECONDS = 10.0
"""How long who connects may take to say who it is."""

HEARTBEAT_SECONDS = 15.0
"""Between two pings of a frontend; one whose host has vanished does not answer, and is given up."""

CLOSE_SECONDS = 1.0
"""How long the other side may take to agree to the end of a link."""

STUCK_BEATS, STUCK_SECONDS = 20, 10.0
"""After the longer of these without a beat the process is called stuck."""


@dataclass(eq=False)
class _Frontend:
    """A frontend that is linked; `left` is set when it needs this process no more."""

    incarnation: int
    process: str
    queue: FrameQueue
    socket: web.WebSocketResponse
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)


class Station:
    """The links of one worker process. Belongs to one event loop; `send` to the workers' thread.

    Args:
        shape: what frontends must agree with.
        parts: the workers.
        stats: what they have done; called in their thread.
        beat_seconds: between two signs of life.
        modules: decode modules that come and go; None is none.
        pools: gives what the pools hold; called in other threads.
        prepare: what a message needs that takes too long for the workers' thread, if anything;
            done in another one before the message is heard, and so are those after it.
        taken: called with a message after that, before a worker hears it.

    Attributes:
        incarnation: of this process; random.
        ready: whether frontends are taken; until then they are told to come again.
    """

    def __init__(
        self,
        shape: wire.Shape,
        parts: Sequence[wire.Part],
        stats: Callable[[], EngineStats],
        beat_seconds: float,
        prepare: Callable[[Message], Callable[[], None] | None] = lambda message: None,
        modules: StationModules | None = None,
        pools: Callable[[], Sequence[PoolView]] = tuple,
        taken: Callable[[Message], None] = lambda message: None,
    ):
        self.incarnation = secrets.token_hex(8)
        self.ready = False
        self._shape = shape
        self._parts = list(parts)
        self._stats = stats
        self._beat_seconds = beat_seconds
        self._prepare = prepare
        self._taken = taken
        self._modules = modules
        if modules is not None:
            modules.broadcast = self._broadcast
        self._looks = PoolLooks(pools)
        self._shows: set[asyncio.Task[None]] = set()
        self._endings: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._frontends: dict[int, _Frontend] = {}
        self._arriving: set[web.WebSocketResponse] = set()
        self._draining = self._closed = False
        self._alive_at = time.monotonic()
        self._beating: asyncio.Task[None] | None = None
        self._thread: WorkerThread | None = None
        # Of the workers' thread.
        self._linked: dict[int, FrameQueue] = {}

    @property
    def is_stuck(self) -> bool:
        """Whether the workers' thread has given no sign of life for many beats."""
        silent = time.monotonic() - self._alive_at
        return self.ready and silent > max(STUCK_BEATS * self._beat_seconds, STUCK_SECONDS)

    @property
    def num_frontends(self) -> int:
        """Frontends that are linked."""
        return len(self._frontends)

    @property
    def draining(self) -> bool:
        """Whether no more sequences are taken."""
        return self._draining

    def open(self, thread: WorkerThread) -> None:
        """Takes frontends from now on, for the workers of a thread that has been started."""
        self._thread = thread
        self._alive_at = time.monotonic()
        self.ready = True
        self._beating = asyncio.create_task(self._beat())

    async def close(self) -> None:
        """Ends all links, those too that have not said hello: it would not be heard any more."""
        self.ready, self._closed = False, True
        if self._beating is not None:
            self._beating.cancel()
        for socket in (*self._arriving, *(f.socket for f in self._frontends.values())):
            await socket.close()

    async def drain(self, seconds: float) -> bool:
        """Has frontends send nothing more, and waits until they need nothing more from here.

        Returns:
            Whether they all said so in time.
        """
        self._draining = True
        for frontend in self._frontends.values():
            frontend.queue.put(wire.Draining())
        try:
            async with asyncio.timeout(seconds):
                while staying := [f for f in self._frontends.values() if not f.left.is_set()]:
                    waits = [asyncio.ensure_future(f.left.wait()) for f in staying]
                    waits += [asyncio.ensure_future(f.gone.wait()) for f in staying]
                    try:
                        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        for wait in waits:
                            wait.cancel()
        except TimeoutError:
            return False
        return True

    async def handle(self, request: web.Request) -> web.WebSocketResponse:
        """The websocket of one frontend, from its hello to its end."""
        socket = web.WebSocketResponse(
            timeout=CLOSE_SECONDS,
            heartbeat=HEARTBEAT_SECONDS,
            max_msg_size=wire.MAX_FRAME_BYTES,
            compress=False,
        )
        try:
            await socket.prepare(request)
            try:
                frontend = await self._arrive(socket)
                if frontend is not None:
                    await self._serve(frontend)
            finally:
                await socket.close()
        except ConnectionError as error:
            # Such as one that has waited while this process was started, and has given up.
            logger.info("a frontend has gone: %s", error)
        return socket

    def send(self, source: str, to: str, message: Message) -> None:
        """Carries a worker's message to where it belongs; in the workers' thread."""
        frame = wire.Carry(source, to, message)
        if isinstance(message, m.IndexChanged | m.IndexSnapshot | m.StoreChanged):
            # Of no sequence, and for all.
            for queue in self._linked.values():
                queue.put(frame)
            return
        queue = self._linked.get(self._owner(message))
        if queue is not None:
            queue.put(frame)

    def _owner(self, message: Message) -> int:
        """Incarnation of the frontend whose sequence a message is about."""
        match message:
            case m.Covered(sequence) | m.Prefill(sequence) | m.Replied(sequence):
                return wire.owner_of(sequence.id)
            case _:
                return wire.owner_of(message.id)  # type: ignore[union-attr]

    async def _arrive(self, socket: web.WebSocketResponse) -> _Frontend | None:
        if self._closed:
            return None
        self._arriving.add(socket)
        try:
            return await self._welcome(socket)
        finally:
            self._arriving.discard(socket)

    async def _welcome(self, socket: web.WebSocketResponse) -> _Frontend | None:
        """Hears who it is, and takes it, so that `_serve` must follow, or refuses it."""
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                hello = wire.decode(await socket.receive_bytes())[0]
        except (TimeoutError, TypeError, IndexError, msgspec.DecodeError) as error:
            if not self._closed:
                logger.warning("a link without a hello: %s", error)
            return None
        while (refusal := self._refusal(hello)) is None:
            assert isinstance(hello, wire.Hello)
            old = self._frontends.get(hello.incarnation)
            if old is None:
                queue = FrameQueue(self._loop)
                new = _Frontend(hello.incarnation, hello.process, queue, socket)
                self._frontends[new.incarnation] = new
                return new
            # It has noticed the end of its link before us.
            await old.socket.close()
            await old.gone.wait()
        if not refusal.again:
            logger.warning("refused a frontend: %s", refusal.reason)
        await socket.send_bytes(wire.encode([refusal]))
        return None

    def _refusal(self, hello: wire.Frame) -> wire.Refused | None:
        if not isinstance(hello, wire.Hello):
            return wire.Refused("the first frame must be a hello", again=False)
        if hello.protocol != wire.PROTOCOL:
            return wire.Refused(
                f"the protocol is {hello.protocol} at the frontend and {wire.PROTOCOL} at the "
                "worker: run the same version of pshare_jax",
                again=False,
            )
        prefills = any(part.side == "prefill" for part in self._parts)
        mismatch = hello.shape.mismatch(self._shape, prefills=prefills)
        if mismatch is not None:
            return wire.Refused(mismatch, again=False)
        other = self._frontends.get(hello.incarnation)
        if other is not None and other.process != hello.process:
            return wire.Refused(
                f"another frontend that is linked has the incarnation {hello.incarnation}, too: "
                "start this one again",
                again=False,
            )
        if not self.ready or self._draining:
            return wire.Refused("draining" if self._draining else "warming up", again=True)
        return None

    async def _serve(self, frontend: _Frontend) -> None:
        """Reads and writes frames until the link ends; then all that came by it is given up."""
        carrying: list[asyncio.Task[None]] = []
        try:
            await self._greet(frontend)
            carrying.append(asyncio.create_task(frontend.queue.send_to(frontend.socket)))
            carrying.append(asyncio.create_task(self._read(frontend)))
            await asyncio.wait(carrying, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # A task of its own: a request is cancelled whose connection is lost, now or meanwhile,
            # and until all is given up the frontend cannot come again.
            ending = asyncio.create_task(self._end(frontend, carrying))
            self._endings.add(ending)
            ending.add_done_callback(self._endings.discard)
            await asyncio.shield(ending)

    async def _greet(self, frontend: _Frontend) -> None:
        """Tells a frontend what is here, and all that happens from then on."""
        entries = dict(self._modules.entries) if self._modules else {}
        welcome = wire.Welcome(self.incarnation, self._parts, self._shape.dtype, entries)
        for frame in self._modules.hosting() if self._modules else ():
            frontend.queue.put(frame)
        await frontend.socket.send_bytes(wire.encode([welcome]))
        await self._in_thread(lambda: self._join(frontend))

    async def _end(self, frontend: _Frontend, carrying: Sequence[asyncio.Task[None]]) -> None:
        """Gives up what came by a link that has ended, and lets its frontend come again."""
        for task in carrying:
            task.cancel()
        for ended in await asyncio.gather(*carrying, return_exceptions=True):
            if isinstance(ended, Exception):
                logger.warning("a frontend's link has ended: %r", ended)
        try:
            await self._in_thread(lambda: self._leave(frontend.incarnation))
            if self._modules is not None:
                self._modules.leave(frontend.incarnation)
        finally:
            self._frontends.pop(frontend.incarnation, None)
            frontend.gone.set()

    async def _read(self, frontend: _Frontend) -> None:
        assert self._thread is not None
        async for received in frontend.socket:
            if received.type is not WSMsgType.BINARY:
                return
            for frame in wire.decode(received.data):
                if isinstance(frame, wire.Carry):
                    if self._modules and (model := self._modules.lacks(frame.message, frame.to)):
                        self._send_back(frontend, frame, model)
                        continue
                    if (preparation := self._prepare(frame.message)) is not None:
                        await asyncio.to_thread(preparation)
                    self._taken(frame.message)
                    self._thread.post(frame.to, frame.message)
                elif isinstance(frame, wire.Left):
                    frontend.left.set()
                elif isinstance(frame, wire.Look):
                    show = asyncio.create_task(self._show(frontend, frame.seen))
                    self._shows.add(show)
                    show.add_done_callback(self._shows.discard)
                elif self._modules and isinstance(frame, wire.Load | wire.Retired | wire.Modules):
                    self._modules.hear(frontend.incarnation, frame)

    async def _show(self, frontend: _Frontend, seen: int) -> None:
        """Tells a frontend what the pools hold, if it does not know."""
        try:
            await self._looks.newest()
        finally:
            # It waits for an answer before it asks again.
            number = self._looks.number
            frontend.queue.put(wire.Pools(number, b"" if number == seen else self._looks.data))

    def _send_back(self, frontend: _Frontend, carried: wire.Carry, model: str) -> None:
        """Gives a sequence of a model back that is not here, such as one that has just gone."""
        assert isinstance(carried.message, m.Prefill | m.Covered)
        sequence, worker = carried.message.sequence, carried.to
        returned = m.Returned(sequence.id, "fetch", f"{worker} does not have model {model}")
        frontend.queue.put(wire.Carry(worker, DISPATCHER, returned))
        if isinstance(carried.message, m.Covered):
            release = m.Release(sequence.held_id)
            frontend.queue.put(wire.Carry(worker, sequence.prefill_worker, release))

    def _broadcast(self, frame: wire.Frame) -> None:
        for frontend in self._frontends.values():
            frontend.queue.put(frame)

    async def _in_thread(self, action: Callable[[], None]) -> None:
        """Has the workers' thread do something, and waits until it has."""
        assert self._thread is not None
        done = asyncio.Event()

        def act() -> None:
            try:
                action()
            finally:
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    self._loop.call_soon_threadsafe(done.set)

        self._thread.call(act)
        await done.wait()

    def _join(self, frontend: _Frontend) -> None:
        """Lets a frontend hear of all that happens from now on; in the workers' thread."""
        assert self._thread is not None
        # Of one pool the index is known by the name of who covers prompts, as in `IndexChanged`.
        told: list[PageCache] = []
        for worker in sorted(self._thread.workers, key=lambda worker: not worker.covers):
            if all(worker.cache is not cache for cache in told):
                told.append(worker.cache)
                frontend.queue.put(wire.Carry(worker.name, DISPATCHER, worker.index_snapshot()))
        for worker in self._thread.workers:
            if (stored := worker.store_snapshot()) is not None:
                frontend.queue.put(wire.Carry(worker.name, DISPATCHER, stored))
        self._linked[frontend.incarnation] = frontend.queue

    def _leave(self, incarnation: int) -> None:
        """Gives up all that a frontend had here; in the workers' thread."""
        assert self._thread is not None
        self._linked.pop(incarnation, None)
        for worker in self._thread.workers:
            for id in worker.held_ids():
                if wire.owner_of(id) == incarnation:
                    worker.receive(m.Abort(id))
                    if worker.covers:
                        worker.receive(m.Release(id))

    async def _beat(self) -> None:
        """Says again and again that the workers' thread gets on; it does so itself."""
        while True:
            await asyncio.sleep(self._beat_seconds)
            await self._in_thread(self._say_alive)

    def _say_alive(self) -> None:
        self._alive_at = time.monotonic()
        assert self._thread is not None
        stats, longest = self._stats(), self._thread.longest_seconds
        loads = {worker.name: worker.loads() for worker in self._thread.workers}
        for incarnation, queue in self._linked.items():
            others = {name: _of_others(load, incarnation) for name, load in loads.items()}
            queue.put(wire.Beat(stats, longest, others))


def _of_others(loads: Mapping[int, int], incarnation: int) -> int:
    """What is not the sequences of that frontend, of loads by sequence."""
    return sum(load for id, load in loads.items() if wire.owner_of(id) != incarnation)
