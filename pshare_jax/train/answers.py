"""Answers of a teacher to prompts that come without one, generated once and kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pshare_jax.convert.files import replace_file
from pshare_jax.errors import DataError
from pshare_jax.models.weights import Weights
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.train.conversation import Turn, is_blank
from pshare_jax.train.data import Dataset, Example
from pshare_jax.train.generate import Prompt, generate
from pshare_jax.train.loss import Recipe
from pshare_jax.train.report import Reporter

BATCH_SIZE = 16
_TITLE = "answers of the teacher"


def answer_with_teacher(
    dataset: Dataset,
    recipe: Recipe,
    weights: Weights,
    tokenizer: Tokenizer,
    *,
    teacher: str,
    max_tokens: int,
    max_length: int,
    folder: Path,
    write: bool,
    reporter: Reporter,
) -> Dataset:
    """`dataset` with the teacher's greedy answers to its examples without turns.

    Empty answers are left out and counted. The answers are kept in `folder`, so that a run that
    goes on reads the same ones.

    Args:
        dataset: see `read_dataset`.
        recipe: of the teacher: its architecture and how it is computed.
        weights: its own, on their mesh.
        tokenizer: the base's.
        teacher: hash of its content: kept answers are those of this teacher.
        max_tokens: most tokens of an answer.
        max_length: most tokens of an example; an answer is cut to it.
        folder: the run folder.
        write: whether this process keeps the answers.
        reporter: shows progress.

    Raises:
        DataError: all answers are empty.
    """
    prompts = [example.tokens for example in dataset.examples if not example.turns]
    if not prompts:
        return dataset
    path = folder / f"answers-{dataset.sha256[:16]}.json"
    facts = {"data": dataset.sha256, "teacher": teacher, "max_tokens": max_tokens}
    answers = _kept(path, facts)
    if answers is None:
        reporter.start(_TITLE, len(prompts))
        done = 0

        def count(finished: int) -> None:
            nonlocal done
            done += finished
            reporter.advance(_TITLE, done, len(prompts))

        answers = generate(
            recipe,
            weights,
            weights,
            [Prompt(tokens.tolist(), 0) for tokens in prompts],
            max_tokens=max_tokens,
            end_token_ids=tokenizer.eos_token_ids,
            batch_size=BATCH_SIZE,
            report=count,
        )
        reporter.stop()
        if write:
            replace_file(path, json.dumps({**facts, "answers": answers}))
    room = [max_length - len(tokens) for tokens in prompts]
    cut = [answer[:most] for answer, most in zip(answers, room, strict=True)]
    say_counts(
        len(cut),
        empty=sum(is_blank(answer, tokenizer) for answer in cut),
        cut=sum(not _has_ended(answer, tokenizer) for answer in cut),
        reporter=reporter,
    )
    return _answered(dataset, cut, tokenizer)


def say_counts(total: int, *, empty: int, cut: int, reporter: Reporter) -> None:
    """Tells how many of a teacher's `total` answers are of no or of less use.

    Raises:
        DataError: all of them are empty.
    """
    if total and empty == total:
        raise DataError(
            f"distill.teacher: all {total} answers are empty, so there is nothing to learn from "
            "them; is it a fine-tune of this base, with this chat template?"
        )
    if empty:
        reporter.say(f"warning: {empty} of {total} answers of the teacher are empty; left out")
    if cut:
        reporter.say(
            f"warning: {cut} of {total} answers of the teacher were cut off before their end, by "
            "distill.max_tokens or data.max_length: nothing teaches these to end"
        )


def _has_ended(answer: Sequence[int], tokenizer: Tokenizer) -> bool:
    return bool(answer) and answer[-1] in tokenizer.eos_token_ids


def _answered(dataset: Dataset, answers: Sequence[Sequence[int]], tokenizer: Tokenizer) -> Dataset:
    """`dataset` with `answers` (token ids) to its examples that have no turns, in order; those
    with an empty one are left out."""
    remaining = iter(answers)
    examples = []
    for example in dataset.examples:
        if not example.turns:
            answer = np.asarray(next(remaining), np.int32)
            if is_blank(answer.tolist(), tokenizer):
                continue
            start = len(example.tokens)
            tokens = np.concatenate([example.tokens, answer])
            turn = Turn(start, len(tokens))
            example = Example(tokens, (turn,), example.source, example.dropped)
        examples.append(example)
    return replace(dataset, examples=examples)


def _kept(path: Path, facts: dict[str, Any]) -> list[list[int]] | None:
    """Answers of an earlier start of the run; None without, or when they are of other facts."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or {name: content.get(name) for name in facts} != facts:
        return None
    return content["answers"]
