"""Pages that a prefill worker gets from another worker before it computes what is left of a prompt.

A prompt whose worker has died, or has evicted it, may still lie where it was generated from. So the
router names a worker that has more of it than who covers it now, and that one is asked for what is
lacking, by keys. The pages come as they go to decode workers: offered, pulled, and checked against
their keys and checksums; a piece at a time, so that who lends is not held up for long. What does
not come in time is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from pshare_jax.core import messages as m
from pshare_jax.core.messages import Outbox
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.pages.prefix_index import Node, PageState
from pshare_jax.core.plans import Landed, Pull
from pshare_jax.core.prefill_task import PrefillTask
from pshare_jax.core.stats import PrefillStats

PIECE_PAGES = 64
"""Pages that are asked for at a time."""

PIECE_SECONDS = 2.0
"""After this a piece is not waited for any more, and the rest is computed."""

AVOID_SECONDS = 30.0
"""How long nothing is asked of a worker whose pages have not come in time."""


@dataclass(eq=False)
class _Piece:
    """Full pages from number `first` of a prompt on, which its worker has been asked for.

    `pull` is set once they are on offer; they may be fewer then. A piece that is `late` is looked
    at once more: it may have come long ago.
    """

    transfer: int
    task: PrefillTask
    first: int
    keys: list[bytes]
    deadline: float | None = None
    pull: Pull | None = None
    late: bool = False


@dataclass(eq=False)
class _Calls:
    """What the executor is to be told with the next plan."""

    pulls: list[Pull] = field(default_factory=list[Pull])
    cancelled: list[int] = field(default_factory=list[int])


class Borrowing:
    """Prompts for which pages are on their way from other workers; they hold pages of their own.

    Args:
        name: of the worker that covers them.
        cache: its pages.
        outbox: where messages to others go.
        transfer_ids: never used twice by anybody.
        stats: what has been done.
    """

    def __init__(
        self,
        name: str,
        cache: PageCache,
        outbox: Outbox,
        transfer_ids: Iterator[int],
        stats: PrefillStats,
    ):
        self._name = name
        self._cache = cache
        self._outbox = outbox
        self._ids = transfer_ids
        self._stats = stats
        self._pieces: dict[int, _Piece] = {}
        self._ready: list[PrefillTask] = []
        self._calls = _Calls()
        self._avoided: dict[str, float] = {}

    @property
    def urgent(self) -> bool:
        """Whether transfers can go on, for which no computation is needed."""
        return bool(self._calls.pulls or self._calls.cancelled)

    @property
    def is_pulling(self) -> bool:
        """Whether the executor has been told of transfers that have not ended."""
        return any(piece.pull is not None for piece in self._pieces.values())

    @property
    def waits(self) -> bool:
        """Whether anything is waited for, so that deadlines count."""
        return bool(self._pieces or self._ready)

    def tasks(self) -> list[PrefillTask]:
        """Prompts that are here."""
        return [*(piece.task for piece in self._pieces.values()), *self._ready]

    def arriving(self) -> set[bytes]:
        """Chain keys of pages that prompts here will have: others wait for them."""
        page_size = self._cache.page_size
        tasks = self.tasks()
        return {key for task in tasks for key in task.sequence.chain[task.filled // page_size :]}

    def ask(self, task: PrefillTask) -> bool:
        """Asks for what a prompt lacks; False where nobody is known who has it.

        The task, which has got its pages, is kept here until what can be had has come.
        """
        sequence, page_size = task.sequence, self._cache.page_size
        first = task.filled // page_size  # until now it has been given whole pages
        keys = sequence.keys[first : first + PIECE_PAGES]
        if sequence.lender in ("", self._name, *self._avoided) or not keys:
            return False
        transfer = next(self._ids)
        self._pieces[transfer] = _Piece(transfer, task, first, keys)
        tokens = sequence.prompt[first * page_size : (first + len(keys)) * page_size]
        wanted = m.Lend(self._name, transfer, sequence.id, keys, tokens)
        self._outbox.append((sequence.lender, wanted))
        return True

    def offered(self, offer: m.Offered) -> None:
        """Pages can be pulled; as many as the worker has."""
        piece = self._pieces.get(offer.transfer)
        if piece is None:
            # It was given up; what is on offer may have begun to be read.
            self._calls.cancelled.append(offer.transfer)
            return
        if piece.pull is not None:
            return
        count = len(offer.descriptors)
        if not 0 < count <= len(piece.keys):
            self._calls.cancelled.append(offer.transfer)
            self._failed(piece)
            return
        pages = piece.task.pages[piece.first : piece.first + count]
        piece.pull = Pull(
            piece.transfer,
            piece.task.sequence.lender,
            offer.descriptors,
            piece.keys[:count],
            pages,
            offer.address,
        )
        self._calls.pulls.append(piece.pull)

    def not_offered(self, refusal: m.NotOffered) -> None:
        """The worker has them no longer."""
        piece = self._pieces.pop(refusal.transfer, None)
        if piece is not None:
            self._ready.append(piece.task)

    def landed(self, transfers: list[Landed]) -> None:
        """Transfers have ended; what did not come as it was asked for is computed."""
        for transfer in transfers:
            piece = self._pieces.get(transfer.transfer)
            if piece is None:
                continue
            if transfer.error is not None:
                self._failed(piece)
            else:
                self._end(piece, landed=True)
                self._index(piece)

    def expire(self, now: float) -> None:
        """Gives up on what has taken too long; `now` is in seconds, from any start."""
        for lender, until in tuple(self._avoided.items()):
            if now >= until:
                del self._avoided[lender]
        for piece in tuple(self._pieces.values()):
            if piece.deadline is None:
                piece.deadline = now + PIECE_SECONDS
            elif now < piece.deadline:
                continue
            elif piece.pull is not None and not piece.late:
                piece.late = True
            else:
                self._avoided[piece.task.sequence.lender] = now + AVOID_SECONDS
                self._failed(piece)

    def take_pulls(self) -> list[Pull]:
        """Transfers to begin."""
        pulls, self._calls.pulls = self._calls.pulls, []
        return pulls

    def take_cancelled(self) -> list[int]:
        """Transfers of which nothing may be written any more."""
        cancelled, self._calls.cancelled = self._calls.cancelled, []
        return cancelled

    def take_ready(self) -> list[PrefillTask]:
        """Prompts for which nothing more comes."""
        ready, self._ready = self._ready, []
        return ready

    def abort(self, id: int) -> PrefillTask | None:
        """Takes out a prompt, with its pages."""
        for piece in tuple(self._pieces.values()):
            if piece.task.sequence.id == id:
                self._end(piece)
                return piece.task
        for task in self._ready:
            if task.sequence.id == id:
                self._ready.remove(task)
                return task
        return None

    def release_all(self) -> None:
        """Gives all pages back."""
        for task in self.tasks():
            self._cache.release(task.pages)
        self._pieces.clear()
        self._ready.clear()
        self._calls = _Calls()

    def _index(self, piece: _Piece) -> None:
        """What has come goes into the index, as if it had been computed here."""
        assert piece.pull is not None
        task, page_size, first = piece.task, self._cache.page_size, piece.first
        sequence, count = task.sequence, len(piece.pull.keys)
        parent = self._cache.node_of(task.pages[first - 1]) if first else None
        for number in range(first, first + count) if parent or not first else ():
            tokens = sequence.prompt[number * page_size : (number + 1) * page_size]
            key = sequence.keys[number]
            if self._cache.find(key, tokens) is not None:
                break  # somebody else has brought it meanwhile: it is found when it is computed
            parent = Node(
                parent=parent,
                parent_key=sequence.parent_key(number),
                page=task.pages[number],
                tokens=tokens,
                # Who had it computed is not known; it is not counted as another's.
                origins=[sequence.model] * page_size,
                key=key,
                state=PageState.READY,
                borrowed=True,
            )
            self._cache.insert(parent)
            task.account(parent, page_size)
            self._stats.borrowed_tokens += page_size
        there = task.filled == (first + count) * page_size
        if not (there and count == len(piece.keys) and self.ask(task)):
            self._ready.append(task)

    def _failed(self, piece: _Piece) -> None:
        self._stats.failed_loans += 1
        self._end(piece)
        self._ready.append(piece.task)

    def _end(self, piece: _Piece, *, landed: bool = False) -> None:
        """Nothing of a piece is on its way any more; who lends it is told."""
        del self._pieces[piece.transfer]
        sequence = piece.task.sequence
        if piece.pull in self._calls.pulls:
            self._calls.pulls.remove(piece.pull)
        if piece.pull is not None and not landed:
            # Also what is not pulled yet: since it is on offer it may have been read.
            self._calls.cancelled.append(piece.transfer)
        self._outbox.append((sequence.lender, m.Repaid(sequence.id, piece.transfer)))
