"""Engines that compute nothing: what they hold and how long their work takes, and no more.

They speak the messages of real workers. A thousand of them run in one process, which the real cores
of workers would do too slowly; the routers above them are the real ones.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass

from pshare_jax.bench.plan.clock import Clock
from pshare_jax.core import messages as m
from pshare_jax.core.messages import Message
from pshare_jax.core.requests import FinishReason, PromptUsage
from pshare_jax.core.router import WorkerInfo
from pshare_jax.core.sequences import Sequence


@dataclass(frozen=True)
class EngineOptions:
    """What an engine can do.

    Args:
        num_pages: of its pool.
        prefill_tokens_per_s: that a prefill engine computes.
        call_seconds: of each prompt besides.
        step_seconds: of a decode step, whatever its rows.
        wire_seconds: that a message takes.
    """

    num_pages: int = 2048
    prefill_tokens_per_s: float = 8_000.0
    call_seconds: float = 0.004
    step_seconds: float = 0.015
    wire_seconds: float = 0.001


class Pool:
    """Keys of pages; those that were used least recently go first, of a chain its end.

    Attributes:
        added, removed: what has changed since somebody last looked; a key is in one of them.
    """

    def __init__(self, num_pages: int):
        self.added: dict[bytes, None] = {}
        self.removed: dict[bytes, None] = {}
        self._num_pages = num_pages
        self._keys: OrderedDict[bytes, None] = OrderedDict()

    def run(self, keys: Sequence_[bytes]) -> int:
        """How many of the first keys are there."""
        for count, key in enumerate(keys):
            if key not in self._keys:
                return count
        return len(keys)

    def use(self, keys: Iterable[bytes]) -> None:
        """Puts a chain in, or uses it again."""
        for key in reversed(list(keys)):
            if key in self.removed:
                # It has left and come back before anybody looked.
                del self.removed[key]
            elif key not in self._keys:
                self.added[key] = None
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > self._num_pages:
            key, _ = self._keys.popitem(last=False)
            if key in self.added:
                del self.added[key]
            else:
                self.removed[key] = None

    def keys(self) -> list[bytes]:
        """All that is there."""
        return list(self._keys)

    def clear(self) -> None:
        """Forgets all, and tells nobody."""
        self._keys.clear()
        self.added.clear()
        self.removed.clear()


class Engine:
    """What prefill and decode engines have in common.

    Args:
        info: name and size.
        clock: virtual time.
        options: what it can do.
        say: carries a message to a part; gets the engine's name, the part's, and the message.
        touched: called when what it holds or has to do has changed.

    Attributes:
        alive: whether it hears and says anything.
        incarnation: grows with each start.
    """

    def __init__(
        self,
        info: WorkerInfo,
        clock: Clock,
        options: EngineOptions,
        say: Callable[[str, str, Message], None],
        touched: Callable[[Engine], None],
    ):
        self.info = info
        self.alive = True
        self.incarnation = 1
        self.pool = Pool(info.num_pages)
        self._clock = clock
        self._options = options
        self._say = say
        self._touched = touched
        self._number = 0

    @property
    def prefills(self) -> bool:
        """Whether it covers prompts."""
        raise NotImplementedError

    def receive(self, source: str, message: Message) -> None:
        """Takes in a message; `source` is who is to hear of it."""
        if isinstance(message, m.IndexWanted):
            keys = self.pool.keys()
            snapshot = m.IndexSnapshot(keys, self._number, self.incarnation)
            self._say(self.info.name, source, snapshot)
        else:
            self._take(source, message)
            self._touched(self)

    def _take(self, source: str, message: Message) -> None:
        raise NotImplementedError

    def loads(self) -> dict[int, int]:
        """What each sequence means here: tokens to be computed, or pages to be read."""
        raise NotImplementedError

    def fail(self) -> None:
        """Ends with all that it has."""
        self.alive = False
        self.pool.clear()

    def restart(self) -> None:
        """Comes again, with nothing."""
        self.alive = True
        self.incarnation += 1
        self._number = 0

    def change(self) -> m.IndexChanged | None:
        """What has entered and left the index since the last call."""
        added, self.pool.added = self.pool.added, {}
        removed, self.pool.removed = self.pool.removed, {}
        if not added and not removed:
            return None
        self._number += 1
        return m.IndexChanged(list(added), list(removed), self._number, self.incarnation)

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        """Does something in a while, unless it has ended by then."""
        incarnation = self.incarnation

        def act() -> None:
            if self.alive and self.incarnation == incarnation:
                action()

        self._clock.at(self._clock.now + seconds, act)


class PrefillEngine(Engine):
    """Covers prompts one after the other."""

    def __init__(self, *args: object):
        super().__init__(*args)  # type: ignore[arg-type]
        self._queue: deque[tuple[str, Sequence]] = deque()
        self._now: dict[int, int] = {}

    @property
    def prefills(self) -> bool:
        """See Engine."""
        return True

    def _take(self, source: str, message: Message) -> None:
        match message:
            case m.Prefill(sequence):
                self._queue.append((source, sequence))
                self._next()
            case m.Abort(id):
                self._queue = deque(item for item in self._queue if item[1].id != id)

    def loads(self) -> dict[int, int]:
        """See Engine."""
        return {sequence.id: sequence.num_uncached for _, sequence in self._queue} | self._now

    def fail(self) -> None:
        """See Engine."""
        super().fail()
        self._queue.clear()
        self._now = {}

    def _next(self) -> None:
        if self._now or not self._queue:
            return
        source, sequence = self._queue.popleft()
        cached = self.pool.run(sequence.keys) * self.info.page_size
        remaining = sequence.covered - cached
        self._now = {sequence.id: remaining}
        self._say(self.info.name, source, m.Pending(sequence.id, remaining))
        seconds = remaining / self._options.prefill_tokens_per_s
        self._later(
            seconds + self._options.call_seconds, lambda: self._done(source, sequence, cached)
        )

    def _done(self, source: str, sequence: Sequence, cached: int) -> None:
        self.pool.use(sequence.keys)
        self._now = {}
        usage = PromptUsage(len(sequence.prompt), sequence.covered - cached, cached, 0)
        self._say(self.info.name, source, m.Pending(sequence.id, 0))
        # By way of the router, as frames of a cluster go.
        self._say(self.info.name, source, m.Covered(sequence, usage))
        self._touched(self)
        self._next()


class DecodeEngine(Engine):
    """Generates for all at once."""

    def __init__(self, *args: object):
        super().__init__(*args)  # type: ignore[arg-type]
        self._pages: dict[int, int] = {}

    @property
    def prefills(self) -> bool:
        """See Engine."""
        return False

    def _take(self, source: str, message: Message) -> None:
        match message:
            case m.Covered(sequence, usage):
                self.pool.use(sequence.keys)
                self._pages[sequence.id] = -(-sequence.num_tokens // self.info.page_size)
                self._say(self.info.name, source, m.Started(sequence.id, usage))
                seconds = sequence.params.max_tokens * self._options.step_seconds
                self._later(seconds, lambda: self._done(source, sequence))
            case m.Abort(id):
                self._pages.pop(id, None)

    def loads(self) -> dict[int, int]:
        """See Engine."""
        return self._pages

    def fail(self) -> None:
        """See Engine."""
        super().fail()
        self._pages.clear()

    def _done(self, source: str, sequence: Sequence) -> None:
        if self._pages.pop(sequence.id, None) is None:
            return
        tokens = (0,) * sequence.params.max_tokens
        self._say(self.info.name, source, m.Tokens(sequence.id, tokens, reason=FinishReason.LENGTH))
        self._touched(self)
