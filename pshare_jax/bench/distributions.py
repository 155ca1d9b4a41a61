"""How far next-token distributions are apart, and what they give to a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pshare_jax.convert.manifest import TOKENIZER_FOLDER, Manifest
from pshare_jax.convert.verify import SAMPLE_PROMPTS, read_prompts
from pshare_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextsOptions:
    """What is measured.

    Args:
        base: a prefill checkpoint.
        prompts: a file with one text a line, whose every position is looked at; empty for the
            sample prompts of `convert verify`.
        max_tokens: of each text.
    """

    base: str = "checkpoints/smollm2-135m"
    prompts: str = ""
    max_tokens: int = 256

    def encoded(self, manifest: Manifest) -> list[list[int]]:
        """Token ids of the texts that are not empty.

        Raises:
            CheckpointError: no such file of texts.
        """
        tokenizer = Tokenizer.load(manifest.folder / TOKENIZER_FOLDER)
        texts = read_prompts(self.prompts) if self.prompts else SAMPLE_PROMPTS
        return [tokens for text in texts if (tokens := tokenizer.encode(text)[: self.max_tokens])]


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
