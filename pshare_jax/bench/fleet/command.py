"""`bench fleet`: a few routers that know things late, beside one that knows all."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pshare_jax.bench.fleet.system import FleetOptions, RoutedFleet

VOCABULARY = 32_000


@dataclass(frozen=True)
class SessionOptions:
    """What is asked.

    Args:
        seconds: in which sessions begin.
        per_second: sessions that begin.
        apps: kinds of agents; those of one begin with the same system prompt.
        system_tokens: of a system prompt.
        turns: of a session.
        turn_tokens: that each turn appends, replies included.
        fan_out: models that are asked at once, each turn, by every second session; by the others
            one after the other.
        reply_tokens: of each reply.
        think_seconds: between a turn's last reply and the next turn, on average.
    """

    seconds: float = 30.0
    per_second: float = 160.0
    apps: int = 50
    system_tokens: int = 2048
    turns: int = 6
    turn_tokens: int = 1024
    fan_out: int = 4
    reply_tokens: int = 32
    think_seconds: float = 1.0


@dataclass(frozen=True)
class RoutersOptions:
    """What is simulated.

    Args:
        routers: how many there are; each call goes to any of them.
        fleet: the engines, and what routers hear of them.
        sessions: what is asked.
        seed: of everything that is random.
    """

    routers: int = 4
    fleet: FleetOptions = field(default_factory=FleetOptions)
    sessions: SessionOptions = field(default_factory=SessionOptions)
    seed: int = 0


class _Session:
    """One session: turns over a context that grows."""

    def __init__(self, fleet: RoutedFleet, options: SessionOptions, models: int, seed: int):
        self._fleet = fleet
        self._options = options
        self._models = models
        self._random = random.Random(seed)
        app = self._random.randrange(options.apps)
        self._context = _tokens(random.Random(-1 - app), options.system_tokens)
        self._fans_out = bool(seed % 2)
        self._turn = 0
        self._left = 0

    def turn(self) -> None:
        """Appends to the context and asks about it."""
        if self._turn == self._options.turns:
            return
        self._turn += 1
        self._context += _tokens(self._random, self._options.turn_tokens)
        self._left = self._options.fan_out
        for _ in range(self._left if self._fans_out else 1):
            self._ask()

    def _ask(self) -> None:
        model = self._left % self._models
        router = self._random.randrange(self._fleet.num_routers)
        self._fleet.submit(router, model, self._context, self._options.reply_tokens, self._answered)

    def _answered(self) -> None:
        self._left -= 1
        if not self._left:
            pause = self._random.expovariate(1 / self._options.think_seconds)
            self._fleet.clock.at(self._fleet.clock.now + pause, self.turn)
        elif not self._fans_out:
            self._ask()


def _tokens(source: random.Random, count: int) -> tuple[int, ...]:
    return tuple(source.choices(range(VOCABULARY), k=count))


def simulate(options: RoutersOptions, routers: int) -> dict[str, Any]:
    """One system to its end; 0 routers are one that knows everything at once.

    Returns:
        `hit_ratio` (tokens found over tokens that were to be covered), `requests`, `errors`,
        `failures`, and `decision_ms`: percentiles by this machine's clock.
    """
    fleet = RoutedFleet(options.fleet, routers, options.seed)
    arrivals = random.Random(options.seed)
    moment, number = 0.0, 0
    while (moment := moment + arrivals.expovariate(options.sessions.per_second)) < (
        options.sessions.seconds
    ):
        session = _Session(fleet, options.sessions, options.fleet.models, number)
        fleet.clock.at(moment, session.turn)
        number += 1
    asked = options.sessions
    fleet.fail_at_random(asked.seconds + asked.turns * asked.think_seconds)
    fleet.clock.run()
    cached = sum(usage.cached_tokens for usage in fleet.ended)
    covered = cached + sum(usage.computed_tokens for usage in fleet.ended)
    times = 1e3 * np.array(fleet.decision_seconds)
    return {
        "hit_ratio": cached / covered,
        "requests": len(fleet.ended),
        "errors": fleet.errors,
        "failures": fleet.failures,
        "decision_ms": {
            name: float(np.percentile(times, share))
            for name, share in (("p50", 50), ("p99", 99), ("max", 100))
        },
    }


def run(options: RoutersOptions) -> dict[str, Any]:
    """`{"options", "routers", "all_knowing", "of_all_knowing"}`, plain data."""
    routers, best = simulate(options, options.routers), simulate(options, 0)
    return {
        "options": asdict(options),
        "routers": routers,
        "all_knowing": best,
        "of_all_knowing": routers["hit_ratio"] / best["hit_ratio"],
    }


def lines(found: dict[str, Any]) -> Sequence[str]:
    """What is printed."""
    options, said = found["options"], []
    fleet = options["fleet"]
    for name in ("routers", "all_knowing"):
        row, times = found[name], found[name]["decision_ms"]
        who = f"{options['routers']} routers" if name == "routers" else "one that knows all"
        said.append(
            f"{who}: {row['requests']} requests, {row['hit_ratio']:.2%} of prompt tokens found, "
            f"{len(row['errors'])} errors, {row['failures']} engines failed; a decision takes "
            f"{times['p50']:.3f} ms (p99 {times['p99']:.3f}, most {times['max']:.2f})"
        )
    said.append(
        f"{fleet['prefill']} prefill and {fleet['decode']} decode engines, beats of "
        f"{fleet['beat_seconds'] * 1e3:.0f} ms, {fleet['failures_per_minute']:.1%} failing a "
        f"minute: {found['of_all_knowing']:.3f} of what could be found"
    )
    return said
