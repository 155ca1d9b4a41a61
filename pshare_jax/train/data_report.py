"""What a data set is like, and what in it may mislead: said before a run starts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from pshare_jax.train.data import Dataset, Example

_SHOWN_DROPPED = 8


def data_report(name: str, dataset: Dataset, train: Dataset | None = None) -> list[str]:
    """Lines about `dataset`.

    Args:
        name: what it is called, such as `data.train`.
        dataset: read with `read_dataset`.
        train: for an evaluation set, the training set: no question should be in both.
    """
    examples = dataset.examples
    lengths = np.array([len(example.tokens) for example in examples])
    answers = [turn.end - turn.start for example in examples for turn in example.turns]
    half, most = np.percentile(lengths, (50, 95)).astype(int)
    lines = [
        f"{name}: {len(examples):,} examples, {len(answers):,} answers; {lengths.sum():,} tokens, "
        f"{sum(answers):,} of them trained; lengths {half} (median), {most} (95 %), {lengths.max()}"
    ]
    if dataset.num_bad_lines:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in dataset.bad_kinds.most_common())
        lines.append(f"{name}: {dataset.num_bad_lines:,} bad lines skipped: {kinds}")
        lines += [f"  skipped {line}" for line in dataset.bad_lines]
    dropped = Counter(field for example in examples for field in example.dropped)
    if dropped:
        shown = ", ".join(f"{f} ({count:,})" for f, count in dropped.most_common(_SHOWN_DROPPED))
        lines.append(f"warning: {name}: what no prompt and no answer shows (examples): {shown}")
    repeated = len(examples) - len({_key(example.tokens) for example in examples})
    if repeated:
        lines.append(f"{name}: {repeated:,} examples are copies of earlier ones")
    if train is not None and (line := _overlap(name, examples, train.examples)):
        lines.append(line)
    return lines


def _overlap(name: str, examples: Sequence[Example], train: Sequence[Example]) -> str | None:
    """A line about examples whose last question is one of the training set's; None without."""
    known: dict[bytes, str] = {}
    for example in train:
        for question in _questions(example):
            known.setdefault(_key(question), example.source)
    found = [
        (example.source, known[key])
        for example in examples
        if (key := _key(_questions(example)[-1])) in known
    ]
    if not found:
        return None
    own, other = found[0]
    return (
        f"warning: {len(found):,} of {len(examples):,} questions of {name} are in data.train too "
        f"(the first: {own} is that of {other}), so that its loss says little about others"
    )


def _questions(example: Example) -> list[np.ndarray]:
    return [example.tokens[: turn.start] for turn in example.turns] or [example.tokens]


def _key(tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
