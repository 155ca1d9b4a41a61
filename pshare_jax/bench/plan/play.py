"""Sessions played against servers in virtual time: the client of `bench agents`."""

from __future__ import annotations

import itertools
from collections import deque
from functools import partial
from typing import Any

from pshare_jax.bench.agents_load import CallRecord, Load, SessionRecord, arrivals
from pshare_jax.bench.agents_stats import summary
from pshare_jax.bench.agents_workload import Workload
from pshare_jax.bench.plan.specs import SystemSpec
from pshare_jax.bench.plan.system import SimCall, System


class SimPlayer:
    """Plays sessions of one workload, as `agents_load.Player` does over HTTP."""

    def __init__(self, system: System, workload: Workload):
        self._system = system
        self._clock = system.clock
        self._workload = workload
        self._numbers = itertools.count()
        self._queue: deque[tuple[int, float | None]] = deque()
        self._free = 0
        self._records: list[SessionRecord] = []

    def play(self, load: Load) -> list[SessionRecord]:
        """Plays all sessions of a load; caches stay as earlier loads left them."""
        self._records = []
        self._free = load.concurrency
        start = self._clock.now
        for offset in arrivals(load):
            number = next(self._numbers)
            asked = start + offset if load.rate > 0 else None
            self._clock.at(start + offset, partial(self._arrive, number, asked))
        self._clock.run()
        return self._records

    def _arrive(self, number: int, arrival: float | None) -> None:
        self._queue.append((number, arrival))
        self._admit()

    def _admit(self) -> None:
        while self._free and self._queue:
            self._free -= 1
            number, arrival = self._queue.popleft()
            now = self._clock.now
            _Session(self, number, now if arrival is None else arrival).step()

    def _ended(self, record: SessionRecord) -> None:
        self._records.append(record)
        self._free += 1
        self._admit()


class _Session:
    def __init__(self, player: SimPlayer, number: int, arrival: float):
        self._player = player
        self._system = player._system
        self._clock = player._clock
        self._number = number
        self._arrival = arrival
        self._asked = arrival
        self._steps = deque(player._workload.steps())
        self._context = player._workload.prompt
        self._calls: list[CallRecord] = []
        self._running = 0

    def step(self) -> None:
        """The next calls, or the end."""
        if not self._steps:
            self._player._ended(SessionRecord(self._arrival, self._clock.now, self._calls))
            return
        models = self._steps[0].models
        self._running = len(models)
        before = self._system.spec.call_seconds / 2
        for model in models:
            self._clock.at(self._clock.now + before, partial(self._submit, model))

    def _submit(self, model: int) -> None:
        tokens = self._player._workload.generated
        after = self._system.spec.call_seconds / 2

        def finished() -> None:
            self._clock.at(self._clock.now + after, partial(self._called, call))

        call = self._system.submit(self._number, model, self._context, tokens, finished)

    def _called(self, call: SimCall) -> None:
        after = self._system.spec.call_seconds / 2
        self._calls.append(
            CallRecord(
                model=str(call.model),
                prompt=call.prompt,
                generated=call.max_tokens,
                asked=self._asked,
                arrivals=[time + after for time in call.arrivals],
                end=self._clock.now,
                cached=call.cached,
                shared=call.shared,
            )
        )
        self._running -= 1
        if self._running:
            return
        step = self._steps.popleft()
        self._context += len(step.models) * call.max_tokens + step.observed
        # After the last step there is no tool to wait for.
        pause = self._player._workload.pause if self._steps else 0.0
        self._asked = self._clock.now + pause
        if pause:
            self._clock.at(self._asked, self.step)
        else:
            self.step()


def simulate(spec: SystemSpec, workload: Workload, load: Load, warmup: int = 0) -> dict[str, Any]:
    """Figures of one simulated run, as `agents_stats.summary` gives of a measured one.

    Adds `engines`: work of all prefill and all decode engines in seconds and as a share of the
    run, prompt tokens computed, decode steps and sequences a step, preemptions.

    Args:
        spec: the servers.
        workload: the shape of a session.
        load: how sessions come.
        warmup: sessions played before and not counted.
    """
    system = System(spec)
    player = SimPlayer(system, workload)
    if warmup:
        player.play(Load(warmup, load.concurrency, 0.0, load.seed + 1))
    before = _work(system)
    figures = summary(player.play(load))
    work = {name: value - before[name] for name, value in _work(system).items()}
    seconds = figures["seconds"]
    steps = work["decode_steps"]
    return figures | {
        "engines": work
        | {
            "prefill_busy": work["prefill_s"] / seconds / len(system.prefill),
            "decode_busy": work["decode_s"] / seconds / len(system.decode),
            "sequences_per_step": figures["generated_tokens"] / steps if steps else 0.0,
            "peak_prefill_pages": max(w.executor.peak_pages for w in system.prefill),
            "peak_decode_pages": max(w.executor.peak_pages for w in system.decode),
        }
    }


def _work(system: System) -> dict[str, float]:
    prefill = [worker.executor for worker in system.prefill]
    decode = [worker.executor for worker in system.decode]
    return {
        "prefill_s": sum(executor.seconds for executor in prefill),
        "decode_s": sum(executor.seconds for executor in decode),
        "computed_tokens": sum(executor.computed_tokens for executor in prefill),
        "decode_steps": sum(executor.steps for executor in decode),
        "preemptions": sum(w.core.stats.preemptions.total() for w in system.decode),
    }
