"""What the time of compiled programs goes to, by the kinds of their operations.

JAX's profiler writes an event for each operation of XLA that ran; a call of C++ through `jax.ffi`
is one, `ffi_call`.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax

from pshare_jax.errors import BenchmarkError


@dataclass(frozen=True)
class ProgramProfile:
    """One compiled program.

    Args:
        share: of the traced time, in which at least one of its operations ran.
        operations: kind to share of the time of all its operations, largest first. An operation's
            time is without that of operations inside it.
    """

    share: float
    operations: dict[str, float]


@dataclass(frozen=True)
class Profile:
    """What ran from the first operation to the last.

    Args:
        seconds: between them.
        idle: share in which no operation ran: the host's, where it does not work beside them.
        programs: by the name of the jitted function, the longest first.
    """

    seconds: float
    idle: float
    programs: dict[str, ProgramProfile]


class _Event(NamedTuple):
    start: float
    end: float
    kind: str


@contextmanager
def traced(folder: Path) -> Iterator[None]:
    """Has JAX's profiler write what runs meanwhile into `folder`: for Perfetto too."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # its events would crowd out those of XLA
    with jax.profiler.trace(str(folder), profiler_options=options):
        yield


def read_profile(folder: Path) -> Profile:
    """What the newest trace in `folder` says.

    Raises:
        BenchmarkError: there is no trace, or no operation in it.
    """
    files = sorted(folder.glob("plugins/profile/*/*.trace.json.gz"))
    if not files:
        raise BenchmarkError(f"{folder} has no trace of JAX's profiler")
    with gzip.open(files[-1], "rt") as file:
        events = json.load(file)["traceEvents"]
    programs: dict[str, dict[int, list[_Event]]] = defaultdict(lambda: defaultdict(list))
    for event in events:
        program = event.get("args", {}).get("hlo_module")
        if event.get("ph") == "X" and program is not None:
            start = 1e-6 * event["ts"]
            found = _Event(start, start + 1e-6 * event["dur"], _kind(event["name"]))
            programs[program.removeprefix("jit_")][event["tid"]].append(found)
    if not programs:
        raise BenchmarkError(f"{files[-1]} has no operation of XLA")
    flat = {name: _flat(threads) for name, threads in programs.items()}
    every = sorted(event for events in flat.values() for event in events)
    seconds = max(event.end for event in every) - every[0].start
    profiles = {
        name: ProgramProfile(_covered(flat[name]) / seconds, _operations(threads.values()))
        for name, threads in programs.items()
    }
    longest = sorted(profiles.items(), key=lambda item: -item[1].share)
    return Profile(seconds, 1 - _covered(every) / seconds, dict(longest))


def _kind(name: str) -> str:
    """`ffi_call.12` is an `ffi_call`, `cond.29.clone` a `cond`."""
    return re.sub(r"(\.(\d+|clone))+$", "", name)


def _flat(threads: Mapping[int, Sequence[_Event]]) -> list[_Event]:
    return sorted(event for events in threads.values() for event in events)


def _operations(threads: Iterable[Sequence[_Event]]) -> dict[str, float]:
    own: dict[str, float] = defaultdict(float)
    for events in threads:
        _add_own_time(sorted(events, key=lambda event: (event.start, -event.end)), own)
    total = sum(own.values())
    return {kind: own[kind] / total for kind in sorted(own, key=own.__getitem__, reverse=True)}


def _add_own_time(events: Sequence[_Event], own: dict[str, float]) -> None:
    """Adds each event's time; takes it from the event of the same thread that it lies in."""
    around: list[_Event] = []
    for event in events:
        while around and around[-1].end <= event.start:
            around.pop()
        if around:
            own[around[-1].kind] -= event.end - event.start
        own[event.kind] += event.end - event.start
        around.append(event)


def _covered(events: Sequence[_Event]) -> float:
    covered, until = 0.0, -math.inf
    for event in events:
        covered += max(0.0, event.end - max(event.start, until))
        until = max(until, event.end)
    return covered
