"""The oracle's split rules."""

from __future__ import annotations

import pytest

from pshare_jax.core.split_rule import Invocation, LastMessage, LastTokens
from tests.engine.harness import every_kind

PROMPT = [5, 9, 7, 7, 3, 5, 9, 8, 7, 4]


def generate(tail, own="full", prompt=PROMPT) -> list[int]:
    models = every_kind()
    return models.oracle.generate(models.base, models.full_weights[own], prompt, 8, tail=tail)


@pytest.mark.parametrize("rule", [LastMessage(((5, 9),)), Invocation((5, 9)), LastTokens(5)])
def test_the_decode_module_reads_from_the_split_on(rule):
    assert generate(rule) == generate(5)
    assert generate(rule) != generate(1)


def test_without_its_invocation_the_base_answers():
    absent = Invocation((6, 6))
    assert generate(absent) == generate(1, own="identity") != generate(1)


def test_without_a_message_the_last_token_is_read():
    assert generate(LastMessage(((6, 6),))) == generate(1)
