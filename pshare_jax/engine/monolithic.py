"""The oracle: one mesh, no paging, no batching, no threads, one token at a time.

Slow and obvious. What the engine serves is compared with this, token by token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pshare_jax.core.split_rule import LastTokens, SplitRule
from pshare_jax.models.attention import KV, DenseCache, init_cache
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.decoder import bind
from pshare_jax.models.weights import Weights


@functools.partial(jax.jit, static_argnums=0)
def _step(
    config: ModelConfig, weights: Weights, cache: list[KV], token: jax.Array, position: jax.Array
) -> tuple[jax.Array, list[KV]]:
    io = DenseCache(config, cache, position)
    decoder = bind(config, weights)
    hidden = decoder.hidden(token[None, None], position[None, None], io)
    return decoder.logits(hidden)[0, 0], io.cache


class Monolithic:
    """Greedy generation by a prefill module and a decode module over one dense cache.

    Args:
        config: the architecture of both.
        max_len: most tokens of prompt plus completion.
        kv_dtype: of the cache; None for that of the weights.
    """

    def __init__(self, config: ModelConfig, max_len: int, kv_dtype: Any = None):
        self._kv_dtype = kv_dtype
        self._config = config
        self._max_len = max_len
        self._step = functools.partial(_step, config)

    def generate(
        self,
        prefill_weights: Weights,
        decode_weights: Weights,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        tail: int | SplitRule = 1,
        end_token_ids: Sequence[int] = (),
    ) -> list[int]:
        """Greedy completion of `prompt` (token ids), the end token included.

        Args:
            prefill_weights: full weights of the prefill module.
            decode_weights: full weights of the decode module.
            prompt: at least one token id.
            max_tokens: most tokens to generate.
            tail: the decode module's split rule; an int is a number of tokens. Without its
                invocation in the prompt, the prefill module answers.
            end_token_ids: generation ends with one of these.
        """
        own_weights, logits, cache = self._read(prefill_weights, decode_weights, prompt, tail)
        output: list[int] = []
        while len(output) < max_tokens:
            token = int(jnp.argmax(logits))
            output.append(token)
            if token in end_token_ids or len(output) == max_tokens:
                break
            position = np.int32(len(prompt) + len(output) - 1)
            logits, cache = self._step(own_weights, cache, np.int32(token), position)
        return output

    def prompt_logprobs(
        self,
        prefill_weights: Weights,
        decode_weights: Weights,
        prompt: Sequence[int],
        *,
        tail: int | SplitRule = 1,
    ) -> np.ndarray:
        """What each token of `prompt` is worth as the next one after those before it.

        Each position is read anew, as a prompt of its own. Arguments as for `generate`.

        Returns:
            `[len(prompt), vocab]` float32 log-probabilities (natural log); row 0 is nan.
        """
        rows = [np.full(self._config.vocab_size, np.nan, np.float32)]
        for end in range(1, len(prompt)):
            _, logits, _ = self._read(prefill_weights, decode_weights, prompt[:end], tail)
            rows.append(np.asarray(jax.nn.log_softmax(logits)))
        return np.stack(rows)

    def _read(
        self,
        prefill_weights: Weights,
        decode_weights: Weights,
        prompt: Sequence[int],
        tail: int | SplitRule,
    ) -> tuple[Weights, jax.Array, list[KV]]:
        """Reads a prompt: the weights that answer, the logits after it, and its KV."""
        scale = prefill_weights["final_norm.scale"]
        cache = init_cache(self._config, 1, self._max_len, self._kv_dtype or scale.dtype)
        # Where a step leaves it: the first step is the same program as the others.
        cache = jax.device_put(cache, getattr(scale, "sharding", None))
        split = (LastTokens(tail) if isinstance(tail, int) else tail).split(prompt)
        own_weights = decode_weights if split.invoked else prefill_weights
        logits = jnp.zeros(self._config.vocab_size)
        for position, token in enumerate(prompt):
            weights = prefill_weights if position < split.covered else own_weights
            logits, cache = self._step(weights, cache, np.int32(token), np.int32(position))
        return own_weights, logits, cache
