"""How far next-token distributions are apart, and what they give to a text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """`[..., vocab]` logits -> log-probabilities in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def divergence(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """KL(a || b) in nats at each position of two arrays of logits `[positions, vocab]`."""
    x, y = log_softmax(a), log_softmax(b)
    return (np.exp(x) * (x - y)).sum(-1)


def perplexity(logits: np.ndarray, texts: Sequence[Sequence[int]]) -> float:
    """Of token ids, but the first of each text; `logits` are of all positions, in order."""
    losses: list[np.ndarray] = []
    start = 0
    for tokens in texts:
        scores = log_softmax(logits[start : start + len(tokens) - 1])
        losses.append(-scores[np.arange(len(scores)), tokens[1:]])
        start += len(tokens)
    return float(np.exp(np.mean(np.concatenate(losses))))
