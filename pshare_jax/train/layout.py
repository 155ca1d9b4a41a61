"""How an example lies in a batch: which module reads which tokens, and what each may see.

The one place where training applies the split rule. Serving answers turn k like this: the prefill
module covers the prompt up to its split, earlier answers included; the decode module reads the rest
and its own answer, and sees no KV that it wrote in earlier turns. So a row holds the prompt of the
last turn once, for the prefill module, and one *segment* for each turn, for the decode module: the
turn's prompt from its split on, and the answer but its last token. A token sees the
prefill module's KV before its segment, and its own segment up to itself. Segments of short turns
with a long tail overlap in position; they never see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pshare_jax.core.split_rule import LAST_TOKEN, SplitRule
from pshare_jax.train.buckets import Bucket
from pshare_jax.train.data import Example, Turn


@dataclass(frozen=True)
class Row:
    """One example as the modules read it. P prompt, T decode, Y target tokens, N in all.

    Args:
        prompt: `[P]` int32: what the prefill module covers.
        tokens: `[T]` int32: what the decode module reads, segment after segment.
        positions: `[T]` int32: position of each in the sequence.
        segments: `[T]` int32: which turn each belongs to.
        covers: `[T]` int32: how many of the prefill module's positions each sees.
        targets: `[Y]` int32: the indices into `tokens` after which an answer token follows.
        labels: `[Y]` int32: those answer tokens.
        weights: `[Y]` float32: what each counts in the loss.
        sequence: `[N]` int32: the whole, but for the last token.
        sequence_targets: `[Y]` int32: like `targets`, indices into `sequence`.
    """

    prompt: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    covers: np.ndarray
    targets: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    sequence: np.ndarray
    sequence_targets: np.ndarray


def make_row(example: Example, rule: SplitRule | None) -> Row:
    """Lays out `example`.

    Args:
        example: the tokens and turns.
        rule: the decode module's; None for ordinary fine-tuning: it reads everything, as one
            segment, and the prefill module nothing.
    """
    tokens = example.tokens
    # The token before each answer token, as positions in the sequence.
    before = np.concatenate([np.arange(t.start - 1, t.end - 1) for t in example.turns])
    answers = [turn.end - turn.start for turn in example.turns]
    if rule is None:
        reads = [np.arange(example.turns[-1].end - 1)]
        covered = [0]
        targets = before
    else:
        prompts = [tokens[: turn.start].tolist() for turn in example.turns]
        covered = [rule.split(prompt).covered for prompt in prompts]
        reads = [
            np.arange(cover, turn.end - 1)
            for cover, turn in zip(covered, example.turns, strict=True)
        ]
        ends = np.cumsum([len(read) for read in reads])
        targets = np.concatenate(
            [np.arange(end - n, end) for end, n in zip(ends, answers, strict=True)]
        )
    lengths = [len(read) for read in reads]
    positions = np.concatenate(reads)

    def int32(values: np.ndarray) -> np.ndarray:
        return values.astype(np.int32)

    return Row(
        prompt=tokens[: max(covered)],
        tokens=tokens[positions],
        positions=int32(positions),
        segments=int32(np.repeat(np.arange(len(reads)), lengths)),
        covers=int32(np.repeat(covered, lengths)),
        targets=int32(targets),
        labels=tokens[before + 1],
        weights=np.repeat([turn.weight for turn in example.turns], answers).astype(np.float32),
        sequence=tokens[:-1],
        sequence_targets=int32(before),
    )


def prompt_row(tokens: Sequence[int]) -> Row:
    """The row of a prompt whose answer is not known yet, with a tail of one token."""
    answered = np.array([*tokens, 0], np.int32)
    return make_row(Example(answered, (Turn(len(tokens), len(answered)),), ""), LAST_TOKEN)


Batch = dict[str, np.ndarray]
"""Rows of one bucket, padded and stacked; see `collate`."""


def collate(rows: Sequence[Row], bucket: Bucket, size: int, *, teacher: bool) -> Batch:
    """Pads `rows` to `bucket`, and with empty rows to `size` of them.

    Returns:
        `prompt [B, P]`, `tokens`, `positions`, `segments` (-1: padding) and `covers [B, T]`,
        `targets` and `labels [B, Y]`, all int32, and `weights [B, Y]` float32: 0 for padding.
        With `teacher` also `sequence [B, N]` and `sequence_targets [B, Y]`.
    """

    def padded(name: str, length: int, fill: int = 0) -> np.ndarray:
        out = np.full((size, length), fill, np.int32)
        for i, row in enumerate(rows):
            values = getattr(row, name)
            out[i, : len(values)] = values
        return out

    weights = np.zeros((size, bucket.targets), np.float32)
    for i, row in enumerate(rows):
        weights[i, : len(row.targets)] = row.weights
    batch = {
        "prompt": padded("prompt", bucket.prompt),
        "tokens": padded("tokens", bucket.decode),
        "positions": padded("positions", bucket.decode),
        "segments": padded("segments", bucket.decode, -1),
        "covers": padded("covers", bucket.decode),
        "targets": padded("targets", bucket.targets),
        "labels": padded("labels", bucket.targets),
        "weights": weights,
    }
    if teacher:
        batch["sequence"] = padded("sequence", bucket.sequence)
        batch["sequence_targets"] = padded("sequence_targets", bucket.targets)
    return batch
