"""How log-probabilities of a prompt's own tokens are spelled: OpenAI's echo, and vLLM's list."""

from __future__ import annotations

from collections.abc import Sequence

from pshare_jax.core.requests import TokenLogprobs
from pshare_jax.serve.protocol import CompletionLogprobs, PromptLogprob, PromptLogprobs
from pshare_jax.text.tokenizer import Tokenizer

# JSON has no minus infinity; OpenAI's stand-in for a probability of zero.
MIN_LOGPROB = -9999.0

Scores = Sequence[TokenLogprobs | None]
"""An entry for each prompt token, None for the first."""


def finite(logprob: float) -> float:
    """`logprob`, or what stands for minus infinity."""
    return max(logprob, MIN_LOGPROB)


def top_by_text(
    tokenizer: Tokenizer, token_id: int, scores: TokenLogprobs, count: int | None
) -> dict[str, float]:
    """The `count` most likely tokens at a place, and the one that stands there."""
    top: dict[str, float] = {}
    # The one that stands there is always listed, though it may not be among the most likely.
    for i, value in (*scores.top[:count], (token_id, scores.logprob)):
        # Of several tokens with one text the likeliest counts.
        top.setdefault(tokenizer.token_text(i), finite(value))
    return top


def echoed(
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    scores: Scores,
    count: int | None,
    text: str,
    skip_special_tokens: bool,
) -> CompletionLogprobs:
    """The prompt's part of an echoing completion's log-probabilities.

    Args:
        tokenizer: names the tokens.
        prompt: token ids.
        scores: of each of them.
        count: how many of the most likely tokens are listed.
        text: the prompt as it is echoed; offsets are into it.
        skip_special_tokens: whether special tokens have no text.
    """
    detokenizer = tokenizer.detokenizer(skip_special_tokens)
    offsets: list[int] = []
    length = 0
    for token_id in prompt:
        # A client's text may differ from its tokens', which a tokenizer may have normalised.
        offsets.append(min(length, len(text)))
        length += len(detokenizer.push(token_id))
    return CompletionLogprobs(
        tokens=[tokenizer.token_text(token_id) for token_id in prompt],
        token_logprobs=[None if s is None else finite(s.logprob) for s in scores],
        top_logprobs=[
            None if s is None else top_by_text(tokenizer, token_id, s, count)
            for token_id, s in zip(prompt, scores, strict=True)
        ],
        text_offset=offsets,
    )


def listed(
    tokenizer: Tokenizer, prompt: Sequence[int], scores: Scores, count: int
) -> PromptLogprobs:
    """vLLM's `prompt_logprobs`; arguments as for `echoed`."""
    entries: PromptLogprobs = []
    for token_id, score in zip(prompt, scores, strict=True):
        if score is None:
            entries.append(None)
            continue
        ranked = {i: (value, rank) for rank, (i, value) in enumerate(score.top, 1)}
        shown = [i for i, _ in score.top[:count]]
        if token_id not in shown:
            shown.append(token_id)
        entry: dict[int, PromptLogprob] = {}
        for i in shown:
            value, rank = ranked.get(i, (score.logprob, None))
            entry[i] = PromptLogprob(finite(value), rank, tokenizer.token_text(i))
        entries.append(entry)
    return entries
