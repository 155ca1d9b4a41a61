"""Random answers under a grammar."""

import functools
import random

import numpy as np

from pshare_jax.text.grammar import GrammarState
from pshare_jax.text.tokenizer import Tokenizer

STRUCTURAL = set(b'"{}[]:,0123456789 truefalsn')


def allowed(state: GrammarState, size: int) -> np.ndarray:
    """The ids that may come next, of `size` ids."""
    words = (size + 31) // 32
    mask = np.full(words + 3, 0xFFFFFFFF, np.uint32)
    state.fill(mask)
    exact = np.zeros(words, np.uint32)
    state.fill(exact)
    assert exact.tobytes() == mask[:words].tobytes()
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert not bits[size:].any()
    return bits.nonzero()[0]


@functools.lru_cache(maxsize=4)
def _weights(tokenizer: Tokenizer) -> np.ndarray:
    """How likely each token is to be taken: those of JSON's syntax more, as a model's would be."""
    return np.array(
        [
            0 if i in tokenizer.eos_token_ids else 30 if set(token) <= STRUCTURAL else 1
            for i, token in enumerate(map(tokenizer.token_bytes, range(tokenizer.vocab_size)))
        ]
    )


def sample(
    tokenizer: Tokenizer,
    state: GrammarState,
    rng: random.Random,
    use_forced: bool,
    max_tokens: int = 400,
) -> str | None:
    """The text of a random answer; None if it had not ended after `max_tokens` tokens.

    Tokens of JSON's syntax are likelier: else hardly a text ever ends.
    """
    weights, end_ids = _weights(tokenizer), tokenizer.eos_token_ids
    ids: list[int] = []
    while len(ids) < max_tokens:
        if use_forced and (forced := state.forced()):
            for token_id in forced:
                assert token_id in allowed(state, tokenizer.vocab_size)
                state.accept(token_id)
            ids += forced
        choices = allowed(state, tokenizer.vocab_size)
        assert len(choices)
        ends = [token_id for token_id in end_ids if (choices == token_id).any()]
        assert bool(ends) == state.complete
        if ends and rng.random() < 0.5:
            state.accept(ends[0])
            assert state.finished
            return tokenizer.decode(ids, skip_special_tokens=False)
        if len(ends) == len(choices):
            continue
        sums = weights[choices].cumsum()
        token_id = int(choices[sums.searchsorted(rng.random() * sums[-1], side="right")])
        assert token_id not in tokenizer.special_ids
        state.accept(token_id)
        ids.append(token_id)
    return None
