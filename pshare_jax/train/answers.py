"""Answers of a teacher to prompts that come without one, generated once and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pshare_jax.convert.files import replace_file
from pshare_jax.models.weights import Weights
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.train.data import Dataset, answered
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

    The answers are kept in `folder`, so that a run that goes on reads the same ones.

    Args:
        dataset: see `read_dataset`.
        recipe: of the teacher: its architecture and how it is computed.
        weights: its own, on their mesh.
        tokenizer: the base's.
        teacher: names it: kept answers are those of this teacher.
        max_tokens: most tokens of an answer.
        max_length: most tokens of an example; an answer is cut to it.
        folder: the run folder.
        write: whether this process keeps the answers.
        reporter: shows progress.
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
    return answered(dataset, [a[:r] for a, r in zip(answers, room, strict=True)])


def _kept(path: Path, facts: dict[str, Any]) -> list[list[int]] | None:
    """Answers of an earlier start of the run; None without, or when they are of other facts."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or {name: content.get(name) for name in facts} != facts:
        return None
    return content["answers"]
