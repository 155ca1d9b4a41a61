"""Masks of single rows: what is left out, what is forced, and what gives way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pshare_jax.core.constraints import GrammarSpec, Thoughts
from pshare_jax.core.plans import Admit
from pshare_jax.core.requests import SamplingParams
from pshare_jax.errors import PshareError
from pshare_jax.runtime.masks import LEAST_JUMP, Masks, RowMask, mask_words
from pshare_jax.text.grammar import GrammarCompiler
from pshare_jax.text.tokenizer import Tokenizer
from tests.text.tiny import write_byte_level

PROMPT = (5, 6, 7)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_byte_level(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def masks(tokenizer: Tokenizer) -> Masks:
    """Of a model with 77 ids more than there are tokens."""
    return Masks(tokenizer.vocab_size + 77, GrammarCompiler(tokenizer))


def row(masks: Masks, output: tuple[int, ...] = (), ends: tuple[int, ...] = (2,), **params: Any):
    sampling = SamplingParams(max_tokens=50, **params)
    admit = Admit(0, 0, (*PROMPT, *output), len(PROMPT), sampling, 0, frozenset(ends))
    found = masks.admit(admit)
    assert found is not None
    return found


def allowed(masks: Masks, *rows: RowMask | None) -> list[set[int]]:
    mask = masks.fill(rows, len(rows) + 1)
    assert mask.shape == (len(rows) + 1, mask_words(masks._vocab_size))
    bits = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little")
    assert bits[-1].all(), "padding rows may have anything"
    return [set(np.flatnonzero(bits[i, : masks._vocab_size]).tolist()) for i in range(len(rows))]


def everything(masks: Masks) -> set[int]:
    return set(range(masks._vocab_size))


def test_rows_without_restrictions_have_no_state(masks: Masks) -> None:
    admit = Admit(0, 0, PROMPT, 3, SamplingParams(temperature=0.5), 0, frozenset())
    assert masks.admit(admit) is None
    assert allowed(masks, None) == [everything(masks)]


def test_min_tokens_hold_back_what_ends_an_answer(masks: Masks) -> None:
    one = row(masks, min_tokens=2, ends=(2, 9))
    assert allowed(masks, one) == [everything(masks) - {2, 9}]
    one.accept(30)
    assert one.active
    assert allowed(masks, one) == [everything(masks) - {2, 9}]
    one.accept(31)
    assert not one.active
    assert allowed(masks, one) == [everything(masks)]


def test_bad_words_are_met_in_the_answer_only(masks: Masks) -> None:
    words = ((40,), (50, 51), (6, 7, 60))
    one = row(masks, bad_words=words)
    assert allowed(masks, one) == [everything(masks) - {40}]
    one.accept(50)
    assert allowed(masks, one) == [everything(masks) - {40, 51}]
    for token in (6, 7):
        one.accept(token)
    assert allowed(masks, one) == [everything(masks) - {40, 60}]


def test_allowed_ids_and_what_would_leave_nothing(masks: Masks) -> None:
    ids = (10, 11, masks._vocab_size - 1)
    assert allowed(masks, row(masks, allowed_token_ids=ids)) == [set(ids)]
    narrowed = row(masks, allowed_token_ids=ids, bad_words=((10,),))
    assert allowed(masks, narrowed) == [{11, masks._vocab_size - 1}]
    contrary = row(masks, allowed_token_ids=(10,), bad_words=((10,),))
    assert allowed(masks, contrary) == [{10}]
    only_ends = row(masks, allowed_token_ids=(2,), min_tokens=5)
    assert allowed(masks, only_ends) == [{2}]


def test_a_grammar_then_its_end(masks: Masks, tokenizer: Tokenizer) -> None:
    one = row(masks, grammar=GrammarSpec("regex", "(x|y)z?"))
    x, y, z = (tokenizer.encode(c)[0] for c in "xyz")
    assert allowed(masks, one)[0] >= {x, y}
    assert z not in allowed(masks, one)[0]
    one.accept(x)
    assert allowed(masks, one) == [{z, *tokenizer.eos_token_ids}]
    one.accept(z)
    assert allowed(masks, one) == [{tokenizer.eos_token_ids[0]}]
    one.accept(2)
    assert allowed(masks, one) == [everything(masks)]
    one.accept(70)
    assert one.error is None


def test_a_forced_text_is_spelled_as_the_tokenizer_does(masks: Masks, tokenizer: Tokenizer) -> None:
    text = "the quick brown fox jumps over the lazy dog"
    one = row(masks, grammar=GrammarSpec("regex", f"{text}(!|\\?)"))
    ids = tokenizer.encode(text)
    forced = one.jump
    assert forced == ids[: len(forced)]
    params = SamplingParams(max_tokens=LEAST_JUMP + 1, grammar=one._admit.params.grammar)
    short = masks.admit(Admit(0, 0, (*PROMPT, forced[0]), 3, params, 0))
    assert short is not None
    assert short.jump == forced[1 : LEAST_JUMP + 1], "no more than there may be"
    assert len(forced) >= LEAST_JUMP
    for token in forced:
        assert allowed(masks, one) == [{token}]
        one.accept(token)
    assert one.error is None


def test_a_replayed_answer_goes_on_where_it_was(masks: Masks, tokenizer: Tokenizer) -> None:
    """After every token, within a forced text too."""
    spec = GrammarSpec("regex", "(ab|c)the quick brown fox(!|\\?)[a-c]{3}")
    rng = np.random.default_rng(0)
    one = row(masks, grammar=spec)
    output: tuple[int, ...] = ()
    while 2 not in output:
        again = row(masks, output, grammar=spec)
        left, also = allowed(masks, one, again)
        assert left == also
        assert one.jump == again.jump
        token = int(rng.choice(sorted(left)))
        one.accept(token)
        output += (token,)
    assert one.tokens == [*PROMPT, *output]


def test_the_grammar_goes_before_everything(masks: Masks, tokenizer: Tokenizer) -> None:
    """An answer that is over ends, whatever `min_tokens` says; words that must come do."""
    x = tokenizer.encode("x")[0]
    spec = GrammarSpec("regex", "x")
    one = row(masks, grammar=spec, min_tokens=9, bad_words=((x,),), allowed_token_ids=(3,))
    assert allowed(masks, one) == [{x}]
    one.accept(x)
    assert allowed(masks, one) == [{tokenizer.eos_token_ids[0]}]


def test_thoughts_come_first(masks: Masks, tokenizer: Tokenizer) -> None:
    spec, ends = GrammarSpec("choice", '["x"]'), set(tokenizer.eos_token_ids)
    x = tokenizer.encode("x")[0]
    begun = row(masks, grammar=spec, thoughts=Thoughts(301, 302, True))
    assert allowed(masks, begun) == [everything(masks) - ends]
    for token in (44, 302):
        begun.accept(token)
    assert allowed(masks, begun) == [{x}]
    free = row(masks, grammar=spec, thoughts=Thoughts(301, 302, False))
    assert allowed(masks, free) == [{x, 301}]
    free.accept(301)
    assert allowed(masks, free) == [everything(masks) - ends]
    at_once = row(masks, (x,), grammar=spec, thoughts=Thoughts(301, 302, False))
    assert allowed(masks, at_once) == [{tokenizer.eos_token_ids[0]}]


def test_what_goes_wrong_is_the_rows_alone(masks: Masks, tokenizer: Tokenizer) -> None:
    forbidden = row(masks, (99,), grammar=GrammarSpec("regex", "x"))
    assert forbidden.error is not None
    assert "forbids token 99" in forbidden.error
    unusable = row(masks, grammar=GrammarSpec("regex", "a(b"))
    assert unusable.error is not None
    fine = row(masks, grammar=GrammarSpec("regex", "[xy]"))
    left = allowed(masks, forbidden, unusable, fine)
    assert left[:2] == [everything(masks)] * 2
    assert left[2] == {tokenizer.encode(c)[0] for c in "xy"}
    with pytest.raises(PshareError, match="needs a tokenizer"):
        Masks(10).admit(
            Admit(0, 0, PROMPT, 3, SamplingParams(grammar=GrammarSpec("regex", "x")), 0)
        )
