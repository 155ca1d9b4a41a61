"""Checks of a request against what is served, before it enters the engine."""

from __future__ import annotations

import math

from pshare_jax.core.requests import MAX_LOGIT_BIAS, MAX_LOGPROBS, Request, SamplingParams
from pshare_jax.errors import RequestError


def check_request(request: Request, vocab_size: int, max_model_len: int) -> None:
    """Refuses what could never be served; the server has checked ranges of wire types.

    Raises:
        RequestError: names the parameter.
    """
    prompt, params = request.prompt_token_ids, request.params
    if not prompt:
        raise RequestError("the prompt is empty; it needs at least one token", "prompt")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        wrong = next(t for t in prompt if not 0 <= t < vocab_size)
        raise RequestError(f"token id {wrong} is out of range 0..{vocab_size - 1}", "prompt")
    if params.max_tokens < 0:
        raise RequestError(f"max_tokens must be at least 0, is {params.max_tokens}", "max_tokens")
    total = len(prompt) + params.max_tokens
    if total > max_model_len:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens and max_tokens is {params.max_tokens}; "
            f"together they exceed the context length of {max_model_len}",
            "max_tokens",
            "context_length_exceeded",
        )
    if len(params.logit_bias) > MAX_LOGIT_BIAS:
        raise RequestError(f"logit_bias has more than {MAX_LOGIT_BIAS} entries", "logit_bias")
    if wrong := [t for t in params.logit_bias if not 0 <= t < vocab_size]:
        raise RequestError(
            f"logit_bias: token id {wrong[0]} is out of range 0..{vocab_size - 1}", "logit_bias"
        )
    if not all(map(math.isfinite, params.logit_bias.values())):
        raise RequestError("logit_bias: every bias must be a finite number", "logit_bias")
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(params, name)
        if count is not None and not 0 <= count <= min(MAX_LOGPROBS, vocab_size):
            raise RequestError(f"{name} must be 0..{MAX_LOGPROBS}", name)
    _check_masks(params, vocab_size)
    values = {
        "temperature": (params.temperature, 0.0, 100.0),
        "top_p": (params.top_p, 0.0, 1.0),
        "min_p": (params.min_p, 0.0, 1.0),
        "top_k": (params.top_k, 0, 2**31 - 1),
        "repetition_penalty": (params.repetition_penalty, 1e-3, 1e3),
        "presence_penalty": (params.presence_penalty, -1e3, 1e3),
        "frequency_penalty": (params.frequency_penalty, -1e3, 1e3),
    }
    for name, (value, low, high) in values.items():
        if not (math.isfinite(value) and low <= value <= high):
            raise RequestError(f"{name} must be {low} .. {high}, is {value}", name)


def _check_masks(params: SamplingParams, vocab_size: int) -> None:
    if not 0 <= params.min_tokens <= params.max_tokens:
        raise RequestError(
            f"min_tokens must be 0 .. max_tokens ({params.max_tokens}), is {params.min_tokens}",
            "min_tokens",
        )
    if not all(params.bad_words):
        raise RequestError("bad_words must hold no empty word", "bad_words")
    ids = {
        "stop_token_ids": params.stop_token_ids,
        "allowed_token_ids": params.allowed_token_ids,
        "bad_words": [token_id for word in params.bad_words for token_id in word],
    }
    for name, given in ids.items():
        if wrong := [t for t in given if not 0 <= t < vocab_size]:
            raise RequestError(
                f"{name}: token id {wrong[0]} is out of range 0..{vocab_size - 1}", name
            )
