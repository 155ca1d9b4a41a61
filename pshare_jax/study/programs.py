"""The code task: small Python functions, described in words, with tests that run them.

A program is up to three steps that change a list of whole numbers and one that sums it up. There
are some hundred thousand of them; which step may stand where is free, so that a program that was
not trained on must be put together from its description.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

ENTRY_POINT = "solve"
_TESTS = 5


@dataclass(frozen=True)
class Program:
    """A function and its description.

    Args:
        question: the task in words.
        source: the function, in a fenced block as chat models answer.
        tests: assertions about it, one a line.
        key: what it does, whatever the words.
    """

    question: str
    source: str
    tests: str
    key: str


@dataclass(frozen=True)
class _Step:
    """Phrases and code of one step; `{k}` stands for a number out of `values`."""

    phrases: tuple[str, ...]
    code: str
    values: tuple[int, ...] = (0,)


_CHANGES = (
    _Step(("keep only the even numbers", "drop the odd numbers"), "[x for x in xs if x % 2 == 0]"),
    _Step(("keep only the odd numbers", "drop the even numbers"), "[x for x in xs if x % 2 != 0]"),
    _Step(
        ("keep the numbers greater than {k}", "drop all numbers up to {k}"),
        "[x for x in xs if x > {k}]",
        (0, 2, 3, 5, 10),
    ),
    _Step(
        ("keep the numbers below {k}", "remove the numbers that are {k} or more"),
        "[x for x in xs if x < {k}]",
        (4, 8, 10, 12, 15),
    ),
    _Step(
        ("multiply each number by {k}", "replace each number by {k} times itself"),
        "[x * {k} for x in xs]",
        (2, 3, 4, 5, 7, 10),
    ),
    _Step(
        ("add {k} to each number", "increase every number by {k}"),
        "[x + {k} for x in xs]",
        (1, 2, 3, 4, 6, 9),
    ),
    _Step(
        ("subtract {k} from each number", "decrease every number by {k}"),
        "[x - {k} for x in xs]",
        (1, 2, 3, 5, 8),
    ),
    _Step(("square each number", "replace each number by its square"), "[x * x for x in xs]"),
    _Step(("negate each number", "flip the sign of every number"), "[-x for x in xs]"),
    _Step(("take absolute values", "drop the signs"), "[abs(x) for x in xs]"),
    _Step(("sort in ascending order", "put the smallest first"), "sorted(xs)"),
    _Step(("sort in descending order", "put the largest first"), "sorted(xs, reverse=True)"),
    _Step(("reverse the order", "turn the list around"), "xs[::-1]"),
    _Step(
        ("take the first {k} numbers", "drop everything after the first {k}"),
        "xs[:{k}]",
        (2, 3, 4, 5),
    ),
    _Step(
        ("take the last {k} numbers", "drop everything before the last {k}"),
        "xs[-{k}:]",
        (2, 3, 4, 5),
    ),
    _Step(("drop the first number", "skip the first element"), "xs[1:]"),
    _Step(("take every second number", "keep every other number"), "xs[::2]"),
    _Step(
        ("remove duplicates, keeping first occurrences", "keep each number's first occurrence"),
        "list(dict.fromkeys(xs))",
    ),
    _Step(
        ("replace each number by its remainder modulo {k}", "take each number modulo {k}"),
        "[x % {k} for x in xs]",
        (2, 3, 4, 5, 7),
    ),
)
_RESULTS = (
    _Step(("return the list", "return what is left"), "xs"),
    _Step(("return the sum", "return the total"), "sum(xs)"),
    _Step(("return how many there are", "return the count"), "len(xs)"),
    _Step(("return the largest, or {k} if there is none",), "max(xs, default={k})", (0, -1)),
    _Step(("return the smallest, or {k} if there is none",), "min(xs, default={k})", (0, -1)),
    _Step(("return whether any is left",), "len(xs) > 0"),
)
_OPENINGS = (
    "Write a Python function solve(xs) for a list of integers xs:",
    "Implement solve(xs) in Python. Given a list of integers,",
    "I need a Python function solve(xs), xs being a list of integers. It should",
)


def generate(seed: int, size: int) -> Iterator[Program]:
    """`size` programs; the same ones for the same seed. Some may do the same."""
    rng = random.Random(seed)
    for _ in range(size):
        yield _program(rng)


def _program(rng: random.Random) -> Program:
    phrases: list[str] = []
    codes: list[str] = []
    for step in [*rng.sample(_CHANGES, rng.choice((1, 2, 2, 3, 3))), rng.choice(_RESULTS)]:
        value = rng.choice(step.values)
        phrases.append(rng.choice(step.phrases).format(k=value))
        codes.append(step.code.format(k=value))
    *changes, result = codes
    body = "".join(f"    xs = {code}\n" for code in changes) + f"    return {result}\n"
    source = f"def {ENTRY_POINT}(xs):\n{body}"
    question = f"{rng.choice(_OPENINGS)} {_joined(phrases)}."
    return Program(question, f"```python\n{source}```", _tests(source, rng), "; ".join(codes))


def _joined(phrases: list[str]) -> str:
    return f"{', then '.join(phrases[:-1])}, and {phrases[-1]}"


def _tests(source: str, rng: random.Random) -> str:
    scope: dict[str, object] = {}
    exec(source, scope)  # built above, from this file's own steps
    solve = scope[ENTRY_POINT]
    assert callable(solve)
    inputs = [[], *([rng.randint(-9, 20) for _ in range(rng.randint(3, 9))] for _ in range(_TESTS))]
    return "".join(f"assert {ENTRY_POINT}({xs}) == {solve(list(xs))!r}\n" for xs in inputs)
