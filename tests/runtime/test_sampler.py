from __future__ import annotations

import functools
import re
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pshare_jax.core.requests import MAX_LOGIT_BIAS, MAX_LOGPROBS, SamplingParams
from pshare_jax.runtime.sampler import (
    History,
    Sampled,
    _filter,
    _penalise,
    empty_history,
    pack_rows,
    sample,
)
from pshare_jax.sharding.rules import TENSOR

VOCAB, MAX_LEN = 12, 16
quick = settings(max_examples=60, deadline=None)
run = jax.jit(sample)
run_filter = jax.jit(_filter)
run_penalise = jax.jit(_penalise)


def history(tokens: list[list[int]], biases: list[dict[int, float]] | None = None) -> History:
    """Rows of known tokens, with garbage after them."""
    known = np.full((len(tokens), MAX_LEN), VOCAB - 1, np.int32)
    ids = np.full((len(tokens), MAX_LOGIT_BIAS), -1, np.int32)
    values = np.zeros((len(tokens), MAX_LOGIT_BIAS), np.float32)
    for i, row in enumerate(tokens):
        known[i, : len(row)] = row
    for i, bias in enumerate(biases or []):
        ids[i, : len(bias)] = list(bias)
        values[i, : len(bias)] = list(bias.values())
    return History(jnp.asarray(known), jnp.asarray(ids), jnp.asarray(values))


def draw(
    logits: np.ndarray,
    params: list[SamplingParams],
    *,
    seeds: list[int] | None = None,
    tokens: list[list[int]] | None = None,
) -> Sampled:
    """One token a row of `logits [B, VOCAB]`; the last of the known tokens is the prompt's."""
    rows = tokens or [[0]] * len(params)
    packed = pack_rows(params, seeds or [0] * len(params), [1] * len(params), len(params))
    lengths = np.array([len(row) for row in rows], np.int32)
    known = history(rows, [dict(p.logit_bias) for p in params])
    return jax.device_get(run(jnp.asarray(logits, jnp.float32), packed, known, lengths))


def random_logits(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (rows, VOCAB)).astype(np.float32)


def test_greedy_is_argmax() -> None:
    logits = random_logits(6)
    logits[3, [2, 7]] = 9.0  # a tie goes to the first
    got = draw(logits, [SamplingParams(temperature=0.0)] * 6)
    np.testing.assert_array_equal(got.tokens, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-5])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    logits = random_logits(4) * 100
    got = draw(logits, [SamplingParams(temperature=temperature)] * 4, seeds=[1, 2, 3, 4])
    np.testing.assert_array_equal(got.tokens, logits.argmax(-1))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, top_k=1),
        SamplingParams(temperature=1.0, top_p=0.0),
        SamplingParams(temperature=1.0, top_p=1e-9),
        SamplingParams(temperature=1.0, min_p=1.0),
    ],
)
def test_the_strictest_filters_leave_the_best(params: SamplingParams) -> None:
    logits = random_logits(8)
    got = draw(logits, [params] * 8, seeds=list(range(8)))
    np.testing.assert_array_equal(got.tokens, logits.argmax(-1))


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x.astype(np.float64) - np.max(x))
    return weights / weights.sum()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0, top_k=5),
        SamplingParams(temperature=1.0, top_p=0.7),
        SamplingParams(temperature=1.0, min_p=0.2, top_k=6, top_p=0.9),
    ],
)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    """Pearson's chi-squared statistic over draws with different seeds stays in its bounds."""
    draws, logits = 4096, random_logits(1)[0]
    got = draw(np.tile(logits, (draws, 1)), [params] * draws, seeds=list(range(draws)))
    counts = np.bincount(got.tokens, minlength=VOCAB)
    scaled = logits / params.temperature
    keep = allowed(scaled, params)
    expected = np.where(keep, softmax(np.where(keep, scaled, -1e9)), 0) * draws
    assert counts[~keep].sum() == 0
    statistic = ((counts - expected)[keep] ** 2 / expected[keep]).sum()
    degrees = keep.sum() - 1
    # Mean `degrees`, variance twice that: this far off means a wrong distribution.
    assert statistic < degrees + 5 * np.sqrt(2 * degrees)


def allowed(scores: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The tokens that the filters leave, by definition, one threshold after the other."""
    probabilities = softmax(scores)
    keep = probabilities >= params.min_p * probabilities.max()
    if 0 < params.top_k < keep.sum():
        keep &= scores >= np.sort(scores[keep])[-params.top_k]
    if params.top_p < 1:
        probabilities = softmax(np.where(keep, scores, -np.inf))
        for value in sorted(set(scores[keep].tolist()), reverse=True):
            if probabilities[scores >= value].sum() >= params.top_p:
                return keep & (scores >= value)
    return keep


@quick
@given(
    # Multiples of a half, so that ties are common.
    scores=st.lists(st.integers(-8, 8), min_size=VOCAB, max_size=VOCAB),
    top_k=st.integers(0, VOCAB + 3),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
)
def test_filters_keep_exactly_the_right_tokens(
    scores: list[int], top_k: int, top_p: float, min_p: float
) -> None:
    values = np.array(scores, np.float32) / 2
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    keep = allowed(values, params)
    # On a threshold itself rounding decides.
    for nearby in (-1e-5, 1e-5):
        moved = SamplingParams(
            temperature=1.0,
            top_k=top_k,
            top_p=top_p + nearby if top_p < 1 else top_p,
            min_p=min(min_p * (1 + nearby), 1.0),
        )
        assume((allowed(values, moved) == keep).all())
    rows = pack_rows([params], [0], [1], 1)
    got = run_filter(jnp.asarray(values)[None], rows)[0]
    np.testing.assert_array_equal(np.isfinite(got), keep)
    np.testing.assert_array_equal(np.asarray(got)[keep], values[keep])


@quick
@given(
    logits=st.lists(st.floats(-5, 5, width=32), min_size=VOCAB, max_size=VOCAB),
    tokens=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=MAX_LEN),
    prompt_len=st.integers(1, MAX_LEN),
    repetition=st.floats(0.5, 2.0),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
)
def test_penalties(
    logits: list[float],
    tokens: list[int],
    prompt_len: int,
    repetition: float,
    presence: float,
    frequency: float,
) -> None:
    params = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
    )
    expected = np.array(logits, np.float64)
    for token in set(tokens):
        expected[token] *= 1 / repetition if expected[token] > 0 else repetition
    for token in set(tokens[prompt_len:]):
        expected[token] -= presence + frequency * tokens[prompt_len:].count(token)
    rows = pack_rows([params], [0], [prompt_len], 1)
    lengths = np.array([len(tokens)], np.int32)
    got = run_penalise(jnp.asarray([logits], jnp.float32), rows, history([tokens]), lengths)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_penalties_decide_the_token() -> None:
    logits = np.zeros((3, VOCAB), np.float32)
    logits[:, 4], logits[:, 5] = 2.0, 1.5
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, repetition_penalty=2.0),
        SamplingParams(temperature=0.0, presence_penalty=1.0),
    ]
    got = draw(logits, params, tokens=[[4, 1], [4, 1], [4, 1]])
    # The 4 is of the prompt: only the repetition penalty counts it.
    assert got.tokens.tolist() == [4, 5, 4]


def test_logit_bias_forces_and_bans() -> None:
    logits = random_logits(4)
    best = int(logits[1].argmax())
    second = int(np.argsort(logits[1])[-2])
    params = [
        SamplingParams(temperature=1.0, logit_bias={3: 100.0}),
        SamplingParams(temperature=0.0, logit_bias={best: -100.0}),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0, logit_bias={t: -100.0 for t in range(VOCAB) if t != 6}),
    ]
    got = draw(logits, params, seeds=[1, 2, 3, 4])
    assert got.tokens.tolist() == [3, second, logits[2].argmax(), 6]


def test_seeds() -> None:
    """A draw depends on seed and position, not on the row or its neighbours."""
    logits = np.tile(random_logits(1), (64, 1))
    hot = SamplingParams(temperature=3.0)
    seeds = list(range(64))
    one = draw(logits, [hot] * 64, seeds=seeds).tokens
    back = draw(logits, [hot] * 64, seeds=seeds[::-1]).tokens[::-1]
    np.testing.assert_array_equal(one, back)
    assert len(set(one.tolist())) > 4
    alone = [int(draw(logits[:1], [hot], seeds=[seed]).tokens[0]) for seed in seeds[:8]]
    assert alone == one[:8].tolist()
    later = draw(logits, [hot] * 64, seeds=seeds, tokens=[[0, 0]] * 64).tokens
    assert (later != one).sum() > 20


def test_logprobs() -> None:
    """They are of the unmodified distribution, whatever has been done to choose the token."""
    logits = random_logits(3)
    params = [
        SamplingParams(temperature=0.0, logprobs=2),
        SamplingParams(temperature=5.0, logprobs=5, logit_bias={1: 100.0}, top_k=3),
        SamplingParams(temperature=0.0),
    ]
    got = draw(logits, params, seeds=[1, 2, 3])
    reference = np.log(np.array([softmax(row) for row in logits]))
    rows = np.arange(3)
    assert got.tokens[1] == 1
    np.testing.assert_allclose(got.logprobs, reference[rows, got.tokens], rtol=1e-5, atol=1e-6)
    assert got.top_ids.shape == (3, MAX_LOGPROBS)
    ordered = np.argsort(-logits, axis=-1)
    np.testing.assert_array_equal(got.top_ids[:, :VOCAB], ordered)
    expected = np.take_along_axis(reference, ordered, axis=-1)
    np.testing.assert_allclose(got.top_logprobs[:, :VOCAB], expected, rtol=1e-5, atol=1e-6)
    # There are fewer tokens than places.
    assert np.isneginf(got.top_logprobs[:, VOCAB:]).all()


def test_nobody_pays_for_logprobs_that_nobody_wants() -> None:
    got = draw(random_logits(2), [SamplingParams()] * 2)
    assert not got.logprobs.any()
    assert not got.top_ids.any()


def test_all_features_in_one_batch() -> None:
    """Each row gets what it would get alone, though its neighbours ask for everything else."""
    features: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 3},
        {"temperature": 1.5, "top_p": 0.6},
        {"temperature": 1.5, "min_p": 0.3},
        {"temperature": 0.0, "repetition_penalty": 1.9},
        {"temperature": 1.0, "presence_penalty": 2.0, "frequency_penalty": 1.0},
        {"temperature": 0.0, "logit_bias": {2: 4.0}},
        {"temperature": 1.0, "logprobs": 4, "top_k": 4, "logit_bias": {0: -100.0}},
    ]
    params = [SamplingParams(**f) for f in features]
    logits = random_logits(len(params), seed=3)
    tokens = [[i % VOCAB, (2 * i) % VOCAB, 5][: 1 + i % 3] for i in range(len(params))]
    seeds = list(range(len(params)))
    together = draw(logits, params, seeds=seeds, tokens=tokens)
    for i, one in enumerate(params):
        alone = draw(logits[i : i + 1], [one], seeds=[i], tokens=[tokens[i]])
        assert alone.tokens[0] == together.tokens[i], features[i]


def test_padding_rows_are_plain() -> None:
    """Rows that fill a bucket up must not switch a feature on."""
    rows = pack_rows([SamplingParams(temperature=0.0)], [7], [3], 4)
    assert rows.temperature.shape == (4,)
    flags = (rows.any_bias, rows.any_filter, rows.any_logprobs, rows.any_penalty, rows.any_random)
    assert not any(flags)
    assert empty_history(2, MAX_LEN).tokens.shape == (3, MAX_LEN)


def test_a_split_vocabulary_is_gathered_once_not_searched_by_messages() -> None:
    """Bisecting over a mesh would take a message of the devices for each bit of either limit."""
    mesh = Mesh(np.asarray(jax.devices()[:2]), (TENSOR,))
    params = [
        SamplingParams(temperature=1.0, top_k=7, top_p=0.8),
        SamplingParams(temperature=0.7, top_p=0.5, min_p=0.01),
        SamplingParams(temperature=0.0),
    ]
    logits, seeds = random_logits(3, 5), [3, 4, 5]
    rows = pack_rows(params, seeds, [1] * 3, 3)
    split = jax.device_put(logits, NamedSharding(mesh, PartitionSpec(None, TENSOR)))
    arguments = split, rows, history([[0]] * 3), np.ones(3, np.int32)
    compiled = jax.jit(functools.partial(sample, mesh=mesh)).lower(*arguments).compile()
    text = compiled.as_text()
    loops = re.findall(r"body=%?([\w.]+)", text)
    assert len(loops) >= 2
    for loop in loops:
        body = re.search(rf"^%?{re.escape(loop)} .*?^}}", text, re.MULTILINE | re.DOTALL)
        assert body is not None
        assert "all-reduce" not in body[0]
    assert "all-gather" in text
    alone = draw(logits, params, seeds=seeds)
    np.testing.assert_array_equal(jax.device_get(compiled(*arguments).tokens), alone.tokens)
