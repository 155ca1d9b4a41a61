"""Random answers under a grammar."""

import random

import numpy as np

from pshare_jax.text.grammar import GrammarState
from pshare_jax.text.tokenizer import Tokenizer

STRUCTURAL = set(b'"{}[]:,0123456789 truefalsn')


def allowed(state: GrammarState, size: int) -> np.ndarray:
    """The ids that may come next, of `size` ids."""
    mask = np.full((size + 31) // 32 + 3, 0xFFFFFFFF, np.uint32)
    state.fill(mask)
    exact = np.zeros((size + 31) // 32, np.uint32)
    state.fill(exact)
    assert (exact == mask[: len(exact)]).all()
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert not bits[size:].any()
    return np.flatnonzero(bits)


def sample(
    tokenizer: Tokenizer,
    state: GrammarState,
    rng: random.Random,
    use_forced: bool,
    max_tokens: int = 400,
) -> str | None:
    """The text of a random answer; None if it had not ended after `max_tokens` tokens.

    Tokens of JSON's syntax are likelier, as a model's would be: else hardly a text ever ends.
    """
    weights = np.array(
        [
            0 if i in tokenizer.eos_token_ids else 30 if set(token) <= STRUCTURAL else 1
            for i, token in enumerate(map(tokenizer.token_bytes, range(tokenizer.vocab_size)))
        ]
    )
    ids: list[int] = []
    while len(ids) < max_tokens:
        if use_forced and (forced := state.forced()):
            for token_id in forced:
                assert token_id in allowed(state, tokenizer.vocab_size)
                state.accept(token_id)
            ids += forced
        choices = allowed(state, tokenizer.vocab_size)
        assert len(choices)
        ends = [token_id for token_id in tokenizer.eos_token_ids if token_id in choices]
        assert bool(ends) == state.complete
        if ends and rng.random() < 0.5:
            state.accept(ends[0])
            assert state.finished
            return tokenizer.decode(ids, skip_special_tokens=False)
        if len(ends) == len(choices):
            continue
        sums = np.cumsum(weights[choices])
        token_id = int(choices[np.searchsorted(sums, rng.random() * sums[-1], side="right")])
        assert token_id not in tokenizer.special_ids
        state.accept(token_id)
        ids.append(token_id)
    return None
