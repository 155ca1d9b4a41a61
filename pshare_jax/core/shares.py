"""Fair shares: whose sequence is next, and whose gives way, by client, model and request.

What there is is divided among clients by their weights, a client's part among the models that it
asks, that among its requests, and a request's part among its sequences. So neither many requests
nor one of many sequences hold back what others want, and no model starves beside a hot one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, TypeVar

from pshare_jax.core.sequences import Part, Sequence


class HasSequence(Protocol):
    """What waits or runs for a sequence."""

    @property
    def sequence(self) -> Sequence: ...  # noqa: D102


MAX_DEPTH = 3
"""Of a request: it is a part of a model's part of a client's."""

T = TypeVar("T", bound=HasSequence)


def in_turn(first: Sequence, others: Iterable[T]) -> list[T]:
    """Who joins `first`, in order: one of each request, then a second one of each, and so on."""
    taken = Counter([first.path[-1]])
    rounds: list[tuple[int, int, T]] = []
    for one in sorted(others, key=lambda one: one.sequence.order):
        request = one.sequence.path[-1]
        rounds.append((taken[request], one.sequence.order, one))
        taken[request] += 1
    return [one for *_, one in sorted(rounds, key=lambda entry: entry[:2])]


class Holdings:
    """What each part holds of something that there is too little of.

    Args:
        held: sequences and how much each holds.
    """

    def __init__(self, held: Iterable[tuple[Sequence, float]]):
        self._held: Counter[Part] = Counter()
        self._weights: dict[Part, float] = {}
        self.oldest: int | None = None
        """Arrival order of the oldest that holds anything."""
        for sequence, amount in held:
            parts = sequence.path
            for part in parts:
                self._held[part] += amount  # type: ignore[assignment]
            self._weights[parts[0]] = sequence.owner.weight
            self.oldest = (
                sequence.order if self.oldest is None else min(self.oldest, sequence.order)
            )

    def depth(self, sequence: Sequence) -> int:
        """How many of its parts hold something: 0 if its client does not, 3 if its request does."""
        return sum(self._held[part] > 0 for part in sequence.path)

    def next(self, waiting: Iterable[T]) -> T:
        """Who is next: of the client, the model and the request that hold least; then the oldest.

        Within a client, better priorities come first. Ties between clients go by age, so that none
        of them can push itself forward.
        """
        return _next(waiting, self._held, self._share)

    def hog(self, newcomer: Sequence, holders: Iterable[T], least: float) -> T | None:
        """Who gives way to a sequence whose client, model or request holds nothing at all.

        That is the youngest of the part that holds most, compared where the paths of both part;
        it must hold at least `least` there, and 2 at least. The oldest holder never gives way.
        """
        eligible = [
            one
            for one in holders
            if one.sequence.order != self.oldest and self._is_hogged(newcomer, one.sequence, least)
        ]
        return max(eligible, key=self._rank, default=None)

    def victim(self, wanting: Sequence, holders: Iterable[T]) -> T | None:
        """Whose pages a sequence that runs may take when there are none left.

        Someone younger, whose part holds no less than its own; the youngest of those that hold
        most. The oldest takes from everybody, so that it always gets on.
        """
        younger = [one for one in holders if one.sequence.order > wanting.order]
        if wanting.order != self.oldest:
            younger = [one for one in younger if self._holds_as_much(one.sequence, wanting)]
        return max(younger, key=self._rank, default=None)

    def _rank(self, one: HasSequence) -> tuple[float, ...]:
        return (*map(self._share, one.sequence.path), one.sequence.order)

    def _share(self, part: Part) -> float:
        # Who holds nothing has no weight here, and needs none.
        return self._held[part] / self._weights.get(part, 1.0)

    def _is_hogged(self, newcomer: Sequence, holder: Sequence, least: float) -> bool:
        mine, theirs = _fork(newcomer, holder)
        if mine == theirs or self._held[mine]:
            return False
        if mine[0] == theirs[0] and newcomer.owner.priority > holder.owner.priority:
            return False
        return self._held[theirs] >= max(least, 2)

    def _holds_as_much(self, other: Sequence, wanting: Sequence) -> bool:
        mine, theirs = _fork(wanting, other)
        return mine == theirs or self._share(theirs) >= self._share(mine)


def _next(
    waiting: Iterable[T], amounts: Mapping[Part, float], weighted: Callable[[Part], float]
) -> T:
    """The first of the client with the least: by priority, then of the model, then the request."""
    best: dict[Part, tuple[tuple[float, ...], T]] = {}
    amount = amounts.get
    for one in waiting:
        sequence = one.sequence
        client, model, request = sequence.path
        claim = sequence.owner.priority, amount(model, 0), amount(request, 0), sequence.order
        found = best.get(client)
        if found is None or claim < found[0]:
            best[client] = claim, one
    client = min(best, key=lambda client: (weighted(client), best[client][1].sequence.order))
    return best[client][1]


def _fork(one: Sequence, other: Sequence) -> tuple[Part, Part]:
    """The parts of both where their paths part; their requests if they are of the same."""
    pairs = list(zip(one.path, other.path, strict=True))
    return next(((a, b) for a, b in pairs if a != b), pairs[-1])


class FairClock:
    """Divides a processor: the part that has had least, by its weight, is next.

    A part that comes, or comes back, starts level with the one of those that wait which has had
    least: it neither makes up for time when it wanted nothing, nor starves others. What clients
    and models have had beyond that is remembered while they want nothing.
    """

    def __init__(self) -> None:
        self._had: dict[Part, float] = {}
        self._least: dict[Part, float] = {}
        """By part: what that of its parts which has had least of those that wait has had."""

    def update(self, wanting: Iterable[Sequence]) -> None:
        """Takes note of who wants something now; to be called before the other methods."""
        present = {part for sequence in wanting for part in sequence.path}
        least: dict[Part, float] = {}
        for part in present & self._had.keys():
            above = part[:-1]
            least[above] = min(least.get(above, self._had[part]), self._had[part])
        self._least.update(least)
        known = {
            part: had
            for part, had in self._had.items()
            if part in present or (len(part) < MAX_DEPTH and had > self._start(part))
        }
        for part in present:
            known[part] = max(known.get(part, 0.0), self._start(part))
        self._had = known
        self._least = {
            part: value for part, value in self._least.items() if not part or part in known
        }

    def next(self, wanting: Iterable[T]) -> T:
        """Who is next; among parts that have had as much, the older."""
        return _next(wanting, self._had, self._had.__getitem__)

    def is_ahead(self, sequence: Sequence, amount: float) -> bool:
        """Whether its client has had more than another that waits, by more than `amount`."""
        client, *_ = sequence.path
        return self._had[client] > self._least.get((), 0.0) + amount

    def worked(self, sequence: Sequence, amount: float) -> None:
        """A sequence that wants something has got as much."""
        client, *others = sequence.path
        self._had[client] += amount / sequence.owner.weight
        for part in others:
            self._had[part] += amount

    def _start(self, part: Part) -> float:
        return self._least.get(part[:-1], 0.0)
