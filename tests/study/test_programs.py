"""Generated programs: what they say, what they do, and that their tests tell right from wrong."""

from __future__ import annotations

import re

import pytest

from pshare_jax.study import programs


def run(source: str, xs: list[int]) -> object:
    scope: dict = {}
    exec(re.fullmatch(r"```python\n(.*)```", source, re.DOTALL).group(1), scope)
    return scope["solve"](xs)


def check(tests: str, solve) -> None:
    exec(tests, {"solve": solve})


def test_a_seed_gives_the_same_programs():
    first, again = list(programs.generate(3, 50)), list(programs.generate(3, 50))
    assert first == again
    assert first != list(programs.generate(4, 50))


def test_programs_pass_their_own_tests_and_others_do_not():
    made = list(programs.generate(1, 60))
    for program in made:
        check(program.tests, lambda xs, program=program: run(program.source, xs))
    different = [p for p in made if p.key != made[0].key]
    failed = 0
    for other in different:
        try:
            check(made[0].tests, lambda xs, other=other: run(other.source, xs))
        except AssertionError:
            failed += 1
    assert failed == len(different)


def test_the_description_names_each_step_in_order():
    step = programs._CHANGES[4]
    assert step.code == "[x * {k} for x in xs]"
    program = next(p for p in programs.generate(0, 9000) if p.key == "[x * 7 for x in xs]; sum(xs)")
    assert run(program.source, [1, 2]) == 21
    assert any(phrase.format(k=7) in program.question for phrase in step.phrases)
    assert re.search(r", and return the (sum|total)\.$", program.question)


@pytest.mark.parametrize("seed", [1, 2])
def test_tests_cover_the_empty_list(seed):
    assert all("assert solve([]) == " in p.tests for p in programs.generate(seed, 20))
