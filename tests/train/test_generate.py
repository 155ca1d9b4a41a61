"""The trainer's own greedy decoding against the oracle, whatever share of a prompt is covered."""

from __future__ import annotations

import numpy as np
import pytest

from pshare_jax.engine.monolithic import Monolithic
from pshare_jax.models.decoder import init_weights
from pshare_jax.models.lora import LoraModule, merge
from pshare_jax.models.weights import lora_specs
from pshare_jax.train.buckets import choose_buckets
from pshare_jax.train.generate import Prompt, generate, prompt_kv
from pshare_jax.train.kv_store import KVStore
from pshare_jax.train.layout import prompt_row
from pshare_jax.train.loss import LoraShape, Recipe
from tests.train.helpers import MODEL

MAX_TOKENS = 6
LENGTHS = (1, 2, 31, 32, 33, 40, 5)
LORA = LoraShape(4, 8.0, ("q", "v", "down"))


@pytest.fixture(scope="module")
def oracle() -> Monolithic:
    return Monolithic(MODEL, 64)


@pytest.fixture(scope="module")
def base():
    return init_weights(MODEL, 0)


def prompts(share: float) -> list[Prompt]:
    rng = np.random.default_rng(3)
    made = []
    for length in LENGTHS:
        tokens = rng.integers(0, MODEL.vocab_size, length).tolist()
        made.append(Prompt(tokens, min(int(share * length), length - 1)))
    return made


def expected(oracle, base, own, made: list[Prompt], ends=()) -> list[list[int]]:
    return [
        oracle.generate(
            base, own, p.tokens, MAX_TOKENS, tail=len(p.tokens) - p.cover, end_token_ids=ends
        )
        for p in made
    ]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_full_modules_generate_the_oracles_tokens(oracle, base, share):
    own = init_weights(MODEL, 1)
    made, recipe = prompts(share), Recipe(MODEL, "float32")
    outputs = generate(
        recipe, own, base, made, max_tokens=MAX_TOKENS, end_token_ids=(), batch_size=4
    )
    assert outputs == expected(oracle, base, own, made)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_kept_kv_gives_the_oracles_tokens(oracle, base, share):
    own = init_weights(MODEL, 1)
    made, recipe = prompts(share), Recipe(MODEL, "float32")
    rows = [prompt_row(p.tokens) for p in made]
    buckets, assigned = choose_buckets(rows, 2)
    store = KVStore(MODEL, rows, "float32", None)
    store.fill(
        np.arange(len(rows)),
        buckets,
        assigned,
        2,
        lambda prompt: np.asarray(prompt_kv(recipe, base, prompt)),
        lambda _: None,
    )
    # Nothing but the store has what the base's weights gave.
    other = init_weights(MODEL, 2)
    outputs = generate(
        recipe,
        own,
        other,
        made,
        max_tokens=MAX_TOKENS,
        end_token_ids=(),
        batch_size=4,
        store=store,
    )
    assert outputs == expected(oracle, base, own, made)


def test_lora_modules_generate_the_oracles_tokens(oracle, base):
    rng = np.random.default_rng(5)
    factors = {
        name: rng.normal(0, 0.1, spec.shape).astype(np.float32)
        for name, spec in lora_specs(MODEL, LORA.rank, LORA.targets).items()
    }
    merged = merge(base, LoraModule(factors, LORA.alpha, LORA.rank, LORA.targets))
    made = prompts(1.0)
    outputs = generate(
        Recipe(MODEL, "float32", LORA), factors, base, made, max_tokens=MAX_TOKENS, end_token_ids=()
    )
    assert outputs == expected(oracle, base, merged, made)
    assert outputs != expected(oracle, base, base, made)


def test_completions_end_with_the_end_token(oracle, base):
    own = init_weights(MODEL, 1)
    made = prompts(1.0)
    # A token that some completions have, not as their first.
    end = expected(oracle, base, own, made)[0][2]
    outputs = generate(
        Recipe(MODEL, "float32"),
        own,
        base,
        made,
        max_tokens=MAX_TOKENS,
        end_token_ids=[end],
        batch_size=4,
    )
    assert outputs == expected(oracle, base, own, made, [end])
    assert outputs[0][-1] == end
    assert len(outputs[0]) <= 3


def test_a_prompt_needs_a_token_for_the_decode_module(base):
    with pytest.raises(ValueError, match="3 tokens cannot be covered for 3"):
        generate(
            Recipe(MODEL, "float32"),
            base,
            base,
            [Prompt([1, 2, 3], 3)],
            max_tokens=1,
            end_token_ids=(),
        )
