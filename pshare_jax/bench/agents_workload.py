"""The sessions of `bench agents`: who is called when, over which context, in real text."""

from __future__ import annotations

import functools
import importlib
import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pshare_jax.bench.limits import Call
from pshare_jax.errors import ConfigError

Pattern = Literal["react", "reflexion", "fanout"]
# Long documentation in plain English that every Python brings along.
_MODULES = """
argparse asyncio calendar codecs collections configparser contextlib csv datetime decimal difflib
doctest email fractions functools gettext heapq inspect io ipaddress itertools json locale logging
mailbox math multiprocessing optparse os pathlib pdb pickle pickletools platform pprint random re
sched secrets shelve shutil socket socketserver statistics string struct subprocess tarfile tempfile
textwrap threading tokenize traceback unittest urllib.request uuid weakref zipfile
"""
_SHORTEST = 200


@dataclass(frozen=True)
class Workload:
    """The shape of every session.

    Args:
        pattern: `react` calls the models in turn and appends each reply and an observation;
            `reflexion` lets the first model act, appends an observation, and lets the others
            evaluate and reflect, each reply appended; `fanout` calls all models at once over one
            context, then appends all replies and one observation.
        models: how many models a session calls.
        turns: how often it calls each.
        prompt: tokens of the first prompt.
        generated: tokens of each reply.
        observed: tokens of each observation.
        pause: seconds that tools take before the observation is there.
    """

    pattern: Pattern = "react"
    models: int = 4
    turns: int = 4
    prompt: int = 512
    generated: int = 24
    observed: int = 48
    pause: float = 0.0

    def __post_init__(self) -> None:
        for name in ("models", "turns", "prompt", "generated"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("observed", "pause"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: must not be negative, got {getattr(self, name)}")

    def steps(self) -> list[Step]:
        """The session, step by step."""
        everyone = range(self.models)
        if self.pattern == "fanout":
            turn = [Step(tuple(everyone), self.observed)]
        elif self.pattern == "reflexion":
            turn = [Step((model,), 0 if model else self.observed) for model in everyone]
        else:
            turn = [Step((model,), self.observed) for model in everyone]
        return turn * self.turns

    def calls(self) -> list[Call]:
        """Model and prompt length of every call."""
        calls, context = [], self.prompt
        for step in self.steps():
            calls += [Call(model, context) for model in step.models]
            context += len(step.models) * self.generated + step.observed
        return calls

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt together with its reply."""
        return self.calls()[-1].prompt + self.generated


@dataclass(frozen=True)
class Step:
    """Models that are called at once, and the tokens observed after their replies."""

    models: tuple[int, ...]
    observed: int


class TextSource:
    """Token ids of real text: documentation of Python's standard library, shuffled by a seed.

    Every session starts with a heading of its own, so that no two share a prefix.

    Args:
        encode: text to token ids, without special tokens.
        seed: of the run; another seed gives other text.
        session: number of the session.
    """

    def __init__(self, encode: Callable[[str], list[int]], seed: int, session: int):
        self._encode = encode
        self._random = random.Random(f"{seed}/{session}")
        token = self._random.getrandbits(64)
        self._ids = encode(f"{token:016x} is the number of case {session}, run {seed}.\n\n")

    def take(self, count: int) -> list[int]:
        """The next `count` token ids."""
        while len(self._ids) < count:
            self._ids += self._encode(self._random.choice(paragraphs()) + "\n\n")
        taken, self._ids = self._ids[:count], self._ids[count:]
        return taken


@functools.cache
def paragraphs() -> tuple[str, ...]:
    """Documentation strings of the standard library of at least a few lines, in a fixed order."""
    texts: set[str] = set()
    for name in _MODULES.split():
        module = importlib.import_module(name)
        members = [value for key, value in sorted(vars(module).items()) if key[0] != "_"]
        documented = [v for v in members if inspect.isclass(v) or inspect.isroutine(v)]
        for value in (module, *documented):
            text = inspect.getdoc(value)
            if text is not None and len(text) >= _SHORTEST:
                texts.add(text)
    return tuple(sorted(texts))
