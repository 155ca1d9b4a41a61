"""Distilling from prompts alone: the teacher answers them first, once."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.convert.orbax import load_weights
from pshare_jax.engine.monolithic import Monolithic
from pshare_jax.errors import DataError
from pshare_jax.train import answers
from pshare_jax.train.answers import answer_with_teacher
from pshare_jax.train.config import DistillConfig
from pshare_jax.train.data import LineReader, read_dataset
from pshare_jax.train.loop import train
from pshare_jax.train.loss import Recipe
from pshare_jax.train.report import Reporter
from tests.train.helpers import MODEL, chats, losses, train_config, write_jsonl

QUIET = Reporter(active=False)
MAX_TOKENS = 5


def bare(count: int) -> list[dict]:
    """Prompts: conversations without their last answer, and plain ones."""
    questions = [{"messages": chat["messages"][:-1]} for chat in chats(count, seed=4, turns=2)]
    return [*questions, {"prompt": "the lazy dog"}]


def read(path: str, tokenizer, **options):
    return read_dataset([path], LineReader(tokenizer, 128, **options), "error")


def test_answers_are_the_teachers_greedy_ones(base, plain_run, tokenizer, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "prompts.jsonl", [*bare(3), *chats(1, seed=5)])
    dataset = read(path, tokenizer, unanswered=True)
    weights = load_weights(plain_run.folder / "decode_module", dtype=jnp.float32)

    def ask(max_length: int = 128):
        return answer_with_teacher(
            dataset,
            Recipe(MODEL, "float32"),
            weights,
            tokenizer,
            teacher="teacher",
            max_tokens=MAX_TOKENS,
            max_length=max_length,
            folder=tmp_path / "run",
            write=True,
            reporter=QUIET,
        )

    made = ask()
    oracle = Monolithic(MODEL, 256)
    # To the last prompt it says nothing, which is left out.
    assert len(made.examples) == len(dataset.examples) - 1
    for before, after in zip(dataset.examples[:3], made.examples[:3], strict=True):
        prompt = before.tokens.tolist()
        expected = oracle.generate(
            weights,
            weights,
            prompt,
            MAX_TOKENS,
            tail=len(prompt),
            end_token_ids=tokenizer.eos_token_ids,
        )
        assert after.tokens.tolist() == prompt + expected
        [turn] = after.turns
        assert (turn.start, turn.end) == (len(prompt), len(after.tokens))
    # One that has an answer keeps it.
    np.testing.assert_array_equal(made.examples[3].tokens, dataset.examples[4].tokens)
    assert made.sha256 == dataset.sha256

    # A run that goes on asks nothing again, and answers do not exceed the length that is allowed.
    monkeypatch.setattr(answers, "generate", None)
    again = ask()
    assert [e.tokens.tolist() for e in again.examples] == [e.tokens.tolist() for e in made.examples]
    longest = max(len(example.tokens) for example in dataset.examples)
    assert len(ask(longest + 1).examples[0].tokens) <= longest + 1


def test_without_a_teacher_a_prompt_alone_is_a_bad_line(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    with pytest.raises(DataError, match=r"prompts\.jsonl:1: .*completion is no text"):
        read(path, tokenizer)


def test_a_prompt_that_is_no_text_is_named(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": 3}])
    with pytest.raises(DataError, match=r"prompts.jsonl:1: needs messages, or prompt"):
        read(path, tokenizer, unanswered=True)


def test_distilling_from_prompts_alone(base, ordinary_run, tmp_path):
    path = write_jsonl(tmp_path / "prompts.jsonl", bare(15))
    teacher = str(ordinary_run / "decode_module")
    config = train_config(
        base,
        path,
        tmp_path / "run",
        mode="distill",
        distill=DistillConfig(teacher, max_tokens=MAX_TOKENS),
        optimizer={"epochs": 3, "learning_rate": 3e-3},
    )
    train(config, QUIET)
    curve = losses(tmp_path / "run")
    assert curve[-1] < 0.8 * curve[0]
    [kept] = (tmp_path / "run").glob("answers-*.json")
    assert len(json.loads(kept.read_text())["answers"]) == 16


def test_empty_and_cut_answers_of_the_teacher_are_counted(tokenizer, tmp_path, monkeypatch):
    end = tokenizer.eos_token_ids[0]
    dataset = read(write_jsonl(tmp_path / "p.jsonl", bare(3)), tokenizer, unanswered=True)
    said: list[str] = []
    monkeypatch.setattr(QUIET, "say", said.append)

    def ask(given: list[list[int]], folder: str):
        monkeypatch.setattr(answers, "generate", lambda *_, **__: given)
        return answer_with_teacher(
            dataset,
            Recipe(MODEL, "float32"),
            {},
            tokenizer,
            teacher=folder,
            max_tokens=MAX_TOKENS,
            max_length=128,
            folder=tmp_path / folder,
            write=False,
            reporter=QUIET,
        )

    made = ask([[end], [70, 71, end], [70, 71], [end]], "some")
    assert [e.source.rpartition(":")[2] for e in made.examples] == ["2", "3"]
    assert [e.tokens[e.turns[0].start :].tolist() for e in made.examples] == [
        [70, 71, end],
        [70, 71],
    ]
    assert said[0] == "warning: 2 of 4 answers of the teacher are empty; left out"
    assert said[1].startswith(
        "warning: 1 of 4 answers of the teacher were cut off before their end"
    )
    with pytest.raises(DataError, match="all 4 answers are empty"):
        ask([[end]] * 4, "none")
