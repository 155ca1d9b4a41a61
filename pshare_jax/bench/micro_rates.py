"""Prefill and decode rates of one or more engines, measured in turn.

Prefill: a prompt of random tokens that nothing has been cached of, from submission to the first
generated token; so handoff and one decode step are in it. Decode: all rows run, their prompts
differ, and the rate is taken over windows in which no row starts or ends.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pshare_jax.bench.micro_targets import MODEL, Event, Target
from pshare_jax.errors import BenchmarkError


@dataclass(frozen=True)
class Rate:
    """Tokens a second: the median, and the slowest and fastest repeat."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, rates: Sequence[float]) -> Rate:
        """From one rate a repeat."""
        return cls(statistics.median(rates), min(rates), max(rates))


class Rates:
    """Measures targets, each repeat on all of them in turn.

    Args:
        targets: by name.
        vocab: random tokens are below this.
        room: tokens that a row may generate at most while it decodes.
        window: tokens a row in one decode window.
        repeats: of each measurement.
        seed: of the random prompts.
        clock: seconds that decode windows are measured in.
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        vocab: int,
        room: int,
        window: int,
        repeats: int,
        seed: int,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._targets = targets
        self._vocab = vocab
        self._room = room
        self._window = window
        self._repeats = repeats
        self._rng = np.random.default_rng(seed)
        self._clock = clock

    def prefill(self, length: int) -> dict[str, list[float]]:
        """Prompt tokens a second, of each target one a repeat."""
        rates: dict[str, list[float]] = {name: [] for name in self._targets}
        for _ in range(self._repeats):
            prompt = self._prompt(length)
            for name, target in self._targets.items():
                started = time.perf_counter()
                target.submit(prompt, 1, MODEL)
                _until_end(target)
                rates[name].append(length / (time.perf_counter() - started))
        return rates

    def decode(
        self, context: int, models: Sequence[str], *, one_prompt: bool = False
    ) -> dict[str, list[float]]:
        """Generated tokens a second of all rows, one row for each of `models` (names that a target
        knows), of each target one a repeat. With `one_prompt` all rows have the same.

        Raises:
            BenchmarkError: rows end within a window, which would then count too little.
        """
        count = 1 if one_prompt else len(models)
        prompts = [self._prompt(context) for _ in range(count)] * (len(models) // count)
        rates: dict[str, list[float]] = {name: [] for name in self._targets}
        for target in self._targets.values():
            for prompt in prompts[:count]:  # their KV is cached from here on
                target.submit(prompt, 1, MODEL)
                _until_end(target)
        for _ in range(self._repeats):
            for name, target in self._targets.items():
                rates[name].append(self._decode_window(target, prompts, models))
        return rates

    def _decode_window(
        self, target: Target, prompts: Sequence[Sequence[int]], models: Sequence[str]
    ) -> float:
        rows = zip(prompts, models, strict=True)
        ids = [target.submit(prompt, self._room, model) for prompt, model in rows]
        waiting = set(ids)
        while waiting:
            waiting.discard(self._running(target).request_id)
        tokens, started = 0, self._clock()
        while tokens < self._window * len(ids):
            tokens += self._running(target).tokens
        rate = tokens / (self._clock() - started)
        for request_id in ids:
            target.abort(request_id)
        for _ in ids:
            _until_end(target)
        return rate

    def _running(self, target: Target) -> Event:
        event = target.next()
        if event.finished:
            raise BenchmarkError(
                f"a row ended before {self._window} tokens of every row were counted: its "
                f"{self._room} tokens were generated faster than rows were started and read"
            )
        return event

    def _prompt(self, length: int) -> list[int]:
        return self._rng.integers(0, self._vocab, length).tolist()


def _until_end(target: Target) -> None:
    while not target.next().finished:
        pass
