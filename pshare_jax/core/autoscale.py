"""How many prefill and how many decode workers there should be: a pure policy, without a clock.

What is observed is turned into a demand of each side, in workers: prompt tokens that come in over
what one worker computes, and what waits; sequences and pages over what one worker can hold at the
speed that is wanted. What one worker can do (`Capacity`) is measured, or told by `bench plan`.

Demands are averaged over a short time and a long one. A change is made if both averages ask for
it, or the short one alone where a side has more to do than it can; and it must have been right for
a while: more workers soon, fewer late, since a worker that comes or goes costs more than one that
idles. Where the number of devices is fixed, a worker changes sides if the busier one is not nearly
idle, and that takes enough off it.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

Side = Literal["prefill", "decode"]


class Capacity(msgspec.Struct, frozen=True):
    """What one worker can do.

    Args:
        prefill_tokens_per_s: prompt tokens that a prefill worker computes.
        decode_sequences: that a decode worker runs at once at the speed that is wanted.
        decode_pages: of its pool that running sequences may fill.
    """

    prefill_tokens_per_s: float
    decode_sequences: float
    decode_pages: float


class Observation(msgspec.Struct, frozen=True):
    """What all workers have to do.

    Args:
        now: seconds, from any start.
        prefill_tokens_per_s: prompt tokens that came in and were not found, a second, since the
            observation before.
        waiting_tokens: prompt tokens that wait to be computed.
        sequences: that run, or wait for a decode worker only.
        pages: that these read, or will.
    """

    now: float
    prefill_tokens_per_s: float = 0.0
    waiting_tokens: float = 0.0
    sequences: float = 0.0
    pages: float = 0.0


class Split(msgspec.Struct, frozen=True):
    """Workers of each side."""

    prefill: int
    decode: int


class Policy(msgspec.Struct, frozen=True):
    """When what is changed.

    Args:
        devices: workers of both sides together, which change sides; 0 lets each side have as many
            as it needs.
        least: workers of each side that there are always.
        most: workers of each side that there may be.
        target: part of what workers can do that the demand should take; the rest is for bursts.
        window, long_window: seconds over which demands are averaged.
        drain_seconds: in which what waits should be computed.
        rise_seconds: for which more must have been right before there are more.
        fall_seconds: for which fewer must have been right.
        settle_seconds: after a change in which no other is made: workers load and compile.
        calm: load of the busier side below which nobody changes sides.
        gain: part of the load of the busier side that a change of sides must take off it, and by
            which the demand must be below what fewer workers can do.
    """

    devices: int = 0
    least: Split = Split(1, 1)
    most: Split = Split(1024, 1024)
    target: float = 0.75
    window: float = 60.0
    long_window: float = 300.0
    drain_seconds: float = 10.0
    rise_seconds: float = 15.0
    fall_seconds: float = 180.0
    settle_seconds: float = 60.0
    calm: float = 0.4
    gain: float = 0.15


class Demand(msgspec.Struct, frozen=True):
    """Workers that each side would be fully busy with."""

    prefill: float
    decode: float

    def load(self, split: Split) -> float:
        """What the busier side is busy with: 1 is all that it can do."""
        return max(self.prefill / split.prefill, self.decode / split.decode)


def demand_of(seen: Observation, capacity: Capacity, drain_seconds: float) -> Demand:
    """The demand at one moment."""
    tokens = seen.prefill_tokens_per_s + seen.waiting_tokens / drain_seconds
    return Demand(
        tokens / capacity.prefill_tokens_per_s,
        max(seen.sequences / capacity.decode_sequences, seen.pages / capacity.decode_pages),
    )


_ONE, _MANY = Split(1, 1), Split(1024, 1024)


def best_split(demand: Demand, devices: int, least: Split = _ONE, most: Split = _MANY) -> Split:
    """The division of `devices`, at least two, whose busier side is least busy, of those in which
    no side has fewer than `least` or more than `most`."""
    counts = range(
        max(least.prefill, devices - most.decode), min(most.prefill, devices - least.decode) + 1
    )
    return min((Split(count, devices - count) for count in counts), key=demand.load)


class Autoscaler:
    """Decides; who asks carries it out.

    Args:
        capacity: of one worker.
        policy: when what is changed.
        split: the workers that there are.

    Attributes:
        capacity: may be replaced at any time by better figures.
        split: what was decided last.
        demand: the average over the short time; None before the first observation.
    """

    def __init__(self, capacity: Capacity, policy: Policy, split: Split):
        self.capacity = capacity
        self.split = split
        self.demand: Demand | None = None
        self._policy = policy
        self._long: Demand | None = None
        self._seen_at = 0.0
        self._began_at = 0.0
        self._settled_at = 0.0
        self._wanted_since: dict[tuple[Side, int], float] = {}

    def observe(self, seen: Observation) -> Split | None:
        """Takes an observation in; the new split when it should change, else None."""
        self._average(seen)
        if seen.now < self._settled_at:
            self._wanted_since.clear()
            return None
        wishes = self._wishes()
        held = {}
        for wish in wishes:
            held[wish] = self._wanted_since.get(wish, seen.now)
        self._wanted_since = held
        changed = self.split
        for side, step in wishes:
            patience = self._policy.rise_seconds if step > 0 else self._policy.fall_seconds
            if seen.now - held[side, step] >= patience:
                changed = self._stepped(changed, side, step)
        if changed == self.split:
            return None
        self.split = changed
        self._settled_at = seen.now + self._policy.settle_seconds
        self._wanted_since.clear()
        return changed

    def _average(self, seen: Observation) -> None:
        new = demand_of(seen, self.capacity, self._policy.drain_seconds)
        if self.demand is None or self._long is None:
            self.demand = self._long = new
            self._began_at = seen.now
            # One figure is no average.
            self._settled_at = seen.now + self._policy.window
        else:
            passed, known = seen.now - self._seen_at, seen.now - self._began_at
            self.demand = _mean(self.demand, new, passed, known, self._policy.window)
            self._long = _mean(self._long, new, passed, known, self._policy.long_window)
        self._seen_at = seen.now

    def _wishes(self) -> list[tuple[Side, int]]:
        """By how many workers each side should change."""
        assert self.demand is not None
        assert self._long is not None
        ask = self._change_sides if self._policy.devices else self._grow_and_shrink
        wishes, lasting = ask(self.demand), ask(self._long)
        return [
            wish
            for wish in wishes
            if wish in lasting or (wish[1] > 0 and self._is_overloaded(wish[0], self.demand))
        ]

    def _is_overloaded(self, side: Side, demand: Demand) -> bool:
        return getattr(demand, side) > getattr(self.split, side)

    def _change_sides(self, demand: Demand) -> list[tuple[Side, int]]:
        """Which side should get a worker of the other, if that takes enough off."""
        policy = self._policy
        best = best_split(demand, policy.devices, policy.least, policy.most)
        load = demand.load(self.split)
        if best.prefill == self.split.prefill or load < self._policy.calm:
            return []
        side: Side = "prefill" if best.prefill > self.split.prefill else "decode"
        gained = load - demand.load(self._stepped(self.split, side, 1))
        return [(side, 1)] if gained > self._policy.gain * load else []

    def _grow_and_shrink(self, demand: Demand) -> list[tuple[Side, int]]:
        """Which sides should have more workers, and which fewer."""
        wishes: list[tuple[Side, int]] = []
        sides: tuple[Side, ...] = ("prefill", "decode")
        least, most = self._policy.least, self._policy.most
        for side in sides:
            wanted, count = getattr(demand, side), getattr(self.split, side)
            fewer = (1 - self._policy.gain) * self._policy.target * (count - 1)
            more = math.ceil(wanted / self._policy.target) > count
            if more and count < getattr(most, side):
                wishes.append((side, 1))
            elif count > getattr(least, side) and wanted < fewer:
                wishes.append((side, -1))
        return wishes

    def _stepped(self, split: Split, side: Side, step: int) -> Split:
        """The split after a step of one side: all that is needed upwards, one downwards."""
        if self._policy.devices:
            prefill = split.prefill + (1 if side == "prefill" else -1)
            return Split(prefill, self._policy.devices - prefill)
        assert self.demand is not None
        count = getattr(split, side)
        if step > 0:
            needed = math.ceil(getattr(self.demand, side) / self._policy.target)
            # At most twice as many at once: what was observed may be a burst.
            count = min(needed, 2 * count, getattr(self._policy.most, side))
        else:
            count -= 1
        return msgspec.structs.replace(split, **{side: count})


def _mean(old: Demand, new: Demand, passed: float, known: float, window: float) -> Demand:
    """A mean in which what is a window old counts for 1/e.

    Args:
        old: the mean before.
        new: what was seen in the last `passed` seconds.
        passed: seconds.
        known: seconds since the first figure; all count alike while these are few.
        window: seconds.
    """
    if passed <= 0:
        return old
    share = max(1 - math.exp(-passed / window), passed / known)
    return Demand(
        old.prefill + share * (new.prefill - old.prefill),
        old.decode + share * (new.decode - old.decode),
    )
