"""Counts the tokens of one HTTP request, honestly."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pshare_jax.core.requests import PromptUsage
from pshare_jax.frontend.output import SequenceOutput
from pshare_jax.serve.protocol import PromptTokensDetails, Usage

log = logging.getLogger(__name__)


def total_usage(sequences: Sequence[SequenceOutput], n: int, prompt_lens: Sequence[int]) -> Usage:
    """Usage of a request whose prompt i has the samples `sequences[i * n : (i + 1) * n]`.

    Each prompt counts once, as its first sample found it: the other samples would call tokens
    cached that the request itself had computed.
    """
    details = [
        _details(sequences[index * n].usage, prompt_len)
        for index, prompt_len in enumerate(prompt_lens)
    ]
    prompt_tokens = sum(prompt_lens)
    completion_tokens = sum(sequence.completion_tokens for sequence in sequences)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(
            cached_tokens=sum(cached for cached, _ in details),
            shared_tokens=sum(shared for _, shared in details),
        ),
    )


def _details(usage: PromptUsage | None, prompt_len: int) -> tuple[int, int]:
    """Cached and shared tokens of one prompt; what cannot be true is logged and cut."""
    if usage is None:
        return 0, 0
    cached = min(usage.cached_tokens, prompt_len)
    shared = min(usage.shared_tokens, cached)
    if (cached, shared) != (usage.cached_tokens, usage.shared_tokens):
        log.error("the engine reports %s for a prompt of %d tokens", usage, prompt_len)
    return cached, shared
