"""Runs with split rules that depend on the prompt: certificates, tokens, what is refused."""

from __future__ import annotations

import json

import jax.numpy as jnp
import pytest

from pshare_jax.convert.orbax import load_weights, read_manifest
from pshare_jax.core.split_rule import Invocation, LastMessage
from pshare_jax.engine.monolithic import Monolithic
from pshare_jax.errors import ConfigError, DataError
from pshare_jax.models.lora import merge
from pshare_jax.text.openings import message_openings
from pshare_jax.train.config import LoraConfig
from pshare_jax.train.generate import Prompt, generate
from pshare_jax.train.loop import train
from pshare_jax.train.loss import LoraShape, Recipe
from pshare_jax.train.report import Reporter
from tests.train.helpers import MODEL, chats, losses, train_config

QUIET = Reporter(active=False)


@pytest.fixture(scope="module")
def assistant(tokenizer) -> list[int]:
    """The tokens that ask for an answer: in every prompt of a chat, and in each once more."""
    return tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)


@pytest.mark.parametrize("kind", ["last-message", "invocation"])
def test_a_module_is_trained_and_answers_by_its_rule(
    base, data, tokenizer, assistant, tmp_path, kind
):
    tail = kind if kind == "last-message" else {"invocation": assistant}
    config = train_config(
        base,
        data,
        tmp_path / "run",
        tail=tail,
        lora=LoraConfig(rank=2, targets=["q", "v", "down"]),
        optimizer={"epochs": 3, "learning_rate": 3e-2},
    )
    record = train(config, QUIET)
    assert record["config"]["tail"] == tail
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    # What is finished is recognised, whatever the rule.
    assert train(config, QUIET) == json.loads(json.dumps(record))

    module = tmp_path / "run" / "decode_module"
    certificate = read_manifest(module).certificate
    assert certificate is not None
    if kind == "last-message":
        assert certificate.tail == LastMessage(message_openings(tokenizer))
    else:
        assert certificate.tail == Invocation(tuple(assistant))
    weights, factors = (load_weights(folder, dtype=jnp.float32) for folder in (base, module))
    prompts = [
        tokenizer.encode(tokenizer.apply_chat_template(chat["messages"][:-1]), False)
        for chat in chats(2, seed=11) + chats(1, seed=12, turns=2)
    ]
    assert certificate.lora_rank is not None
    assert certificate.lora_alpha is not None
    assert certificate.lora_targets is not None
    shape = LoraShape(certificate.lora_rank, certificate.lora_alpha, certificate.lora_targets)
    answers = generate(
        Recipe(MODEL, "float32", shape),
        factors,
        weights,
        [Prompt(prompt, certificate.tail.split(prompt).covered) for prompt in prompts],
        max_tokens=8,
        end_token_ids=(),
    )
    oracle, merged = Monolithic(MODEL, 128), merge(weights, certificate.lora_module(factors))
    assert answers == [
        oracle.generate(weights, merged, prompt, 8, tail=certificate.tail) for prompt in prompts
    ]


def test_lines_without_the_invocation_are_refused_or_skipped(base, data, tmp_path):
    config = train_config(
        base, data, tmp_path / "run", tail={"invocation": [399, 398]}, lora=LoraConfig(rank=2)
    )
    with pytest.raises(DataError, match=r"train.jsonl:1: a prompt does not hold the invocation"):
        train(config, QUIET)
    assert not (tmp_path / "run").exists()


def test_an_invocation_is_for_lora(base, data, tmp_path):
    with pytest.raises(ConfigError, match="tail: an invocation is for LoRA modules"):
        train_config(base, data, tmp_path / "run", tail={"invocation": [5]})


def test_a_run_goes_on_under_the_former_name_of_its_base(base, data, plain_run, tmp_path):
    """Nothing is trained again because a fingerprint got another form."""
    manifest = read_manifest(base)
    config = train_config(base, data, tmp_path / "run", tail=2, optimizer={"max_steps": 1})
    record = train(config, QUIET)
    for name in ("run.json", "decode_module/training.json"):
        path = tmp_path / "run" / name
        path.write_text(path.read_text().replace(manifest.fingerprint, manifest.former[0]))
    assert train(config, QUIET) == json.loads(json.dumps(record))
    (tmp_path / "run" / "decode_module" / "training.json").unlink()
    (tmp_path / "run" / "decode_module").rename(tmp_path / "old")
    assert train(config, QUIET)["base"] == manifest.fingerprint
