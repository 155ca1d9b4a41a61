"""What frontends say of the load, and what that is to the policy of `autoscale`. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pshare_jax.core.autoscale import Capacity, Observation
from pshare_jax.core.stats import EngineStats

BUSY_SECONDS = 0.5
"""Of work, from which on it says how quick prefill workers are."""

RATE_SECONDS = 30.0
"""Of work, after which what was known of that counts for little."""


class Load(msgspec.Struct, frozen=True):
    """What a frontend knows.

    Args:
        incarnation: of the frontend process; its counters begin anew with it.
        waiting_tokens: prompt tokens of its own sequences that wait to be computed.
        sequences: of its own, that run or wait for a decode worker only.
        computed_tokens: prompt tokens that all workers have computed.
        prefill_seconds: for which all prefill workers have worked.
        used_pages: of all decode pools, that running sequences hold.
        pages: of all decode pools.
        decode_workers: that are linked.
    """

    incarnation: int
    waiting_tokens: int = 0
    sequences: int = 0
    computed_tokens: int = 0
    prefill_seconds: float = 0.0
    used_pages: int = 0
    pages: int = 0
    decode_workers: int = 0


def load_of(stats: EngineStats, incarnation: int, waiting_tokens: int, sequences: int) -> Load:
    """A frontend's load.

    Args:
        stats: of all workers, as they last said.
        incarnation: of the frontend.
        waiting_tokens: see `Load`.
        sequences: see `Load`.
    """
    computed = {key: n for key, n in stats.prefill_tokens.items() if key[1] == "computed"}
    busy = [s for name, s in stats.busy_seconds.items() if name.startswith("prefill")]
    pools = [pool for name, pool in stats.pools.items() if name.startswith("decode")]
    return Load(
        incarnation,
        waiting_tokens,
        sequences,
        sum(computed.values()),
        sum(busy),
        sum(pool.used for pool in pools),
        sum(pool.total for pool in pools),
        len(pools),
    )


class Observer:
    """Makes observations of loads, and learns what a worker can do.

    Args:
        prefill_tokens_per_s: that a prefill worker computes; 0 is what it is seen to.
        decode_sequences: that a decode worker runs at once at the speed that is wanted.
    """

    def __init__(self, prefill_tokens_per_s: float, decode_sequences: float):
        self._told = prefill_tokens_per_s
        self._rate = prefill_tokens_per_s
        self._sequences = decode_sequences
        self._last: tuple[float, Load] | None = None

    def observe(self, now: float, loads: Sequence[Load]) -> tuple[Observation, Capacity] | None:
        """What there is to do, and what one worker can; None while that cannot be known.

        Args:
            now: seconds, from any start.
            loads: of all frontends, at least one.
        """
        # What workers have done, all frontends say alike; that of one is compared with itself.
        said = loads[0]
        last, self._last = self._last, (now, said)
        if last is None or last[1].incarnation != said.incarnation or now <= last[0]:
            return None
        passed = now - last[0]
        computed = said.computed_tokens - last[1].computed_tokens
        busy = said.prefill_seconds - last[1].prefill_seconds
        if computed < 0 or busy < 0 or not said.decode_workers:
            return None
        self._learn(computed, busy)
        if self._rate <= 0:
            return None
        observation = Observation(
            now,
            computed / passed,
            sum(load.waiting_tokens for load in loads),
            sum(load.sequences for load in loads),
            said.used_pages,
        )
        pages = max(1.0, said.pages / said.decode_workers)
        return observation, Capacity(self._rate, self._sequences, pages)

    def _learn(self, computed: int, busy: float) -> None:
        if self._told or busy < BUSY_SECONDS or not computed:
            return
        share = min(1.0, busy / RATE_SECONDS) if self._rate else 1.0
        self._rate += share * (computed / busy - self._rate)
