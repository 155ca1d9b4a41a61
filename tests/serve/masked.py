"""Answers of an engine without a model: random tokens, as far as the request's masks allow."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from pshare_jax.core.plans import Admit
from pshare_jax.core.requests import Request
from pshare_jax.runtime.masks import Masks
from tests.serve.fake import FakeOrchestrator

LIKELY = set(b'"{}[]:,0123456789 truefalsn()<\n')


def masked_answers(engine: FakeOrchestrator) -> Callable[[Request], list[int]]:
    """A script: what follows depends on the request's seed alone; no seed is seed 0.

    Tokens of JSON's syntax and the end are likelier than others, as a model's would be.
    """
    tokenizer, size = engine.tokenizer, engine.model_config.vocab_size
    masks = Masks(size, engine.grammars)
    weights = np.array(
        [
            30 if i in tokenizer.eos_token_ids else 30 if token and set(token) <= LIKELY else 1
            for i, token in enumerate(map(tokenizer.token_bytes, range(size)))
        ]
    )

    def script(request: Request) -> list[int]:
        params = request.params
        rng = random.Random(params.seed or 0)
        prompt = request.prompt_token_ids
        ends = frozenset({*params.stop_token_ids, *tokenizer.eos_token_ids})
        row = masks.admit(Admit(0, 0, prompt, len(prompt), params, 0, ends))
        tokens: list[int] = []
        while len(tokens) < params.max_tokens:
            mask = masks.fill([row], 1)[0]
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:size])
            tokens.append(int(rng.choices(allowed, weights[allowed])[0]))
            if tokens[-1] in ends:
                break
            if row is not None:
                row.accept(tokens[-1])
                assert row.error is None, row.error
        return tokens

    return script
