"""The questions of the study in small."""

from __future__ import annotations

from pshare_jax.study.quick import lookups


def test_questions_have_one_capital_that_decides():
    answers = {}
    for question, answer in lookups(1, 300):
        [capital] = [letter for letter in question if letter.isupper()]
        assert answers.setdefault(capital, answer) == answer
    assert sorted(answers) == sorted(answers.values()) == list("ABCDEFGHIJKLMNOP")
