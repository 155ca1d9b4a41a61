"""A tiny base, tiny data sets, and configurations to train with."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.proto.event_pb2 import Event

from pshare_jax.convert.orbax import write_prefill
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.decoder import init_weights
from pshare_jax.train.config import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    ReportConfig,
    TrainConfig,
)
from pshare_jax.train.config_check import check_config
from tests.helpers import tiny_config
from tests.text.tiny import write_byte_level

MODEL: ModelConfig = tiny_config(vocab_size=416, max_position_embeddings=512)
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "then", "all")


SHALLOW: ModelConfig = dataclasses.replace(MODEL, num_layers=1)
"""For what trains many times over and asks nothing of the model."""


def write_base(folder: Path, model: ModelConfig = MODEL) -> Path:
    tokenizer = write_byte_level(folder / "tokenizer-files")
    files = {path.name: path.read_bytes() for path in tokenizer.iterdir()}
    write_prefill(folder / "base", model, init_weights(model, 0), files)
    return folder / "base"


def chats(count: int, seed: int, turns: int = 1) -> list[dict[str, Any]]:
    """Conversations in which the user says some words and the assistant the first and last."""
    rng = np.random.default_rng(seed)
    records = []
    for _ in range(count):
        messages = []
        for _ in range(turns):
            words = rng.choice(WORDS, rng.integers(2, 6)).tolist()
            messages.append({"role": "user", "content": " ".join(words)})
            messages.append({"role": "assistant", "content": f"{words[0]} {words[-1]}"})
        records.append({"messages": messages})
    return records


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def train_config(base: Path, data: str, output: Path, /, **overrides: Any) -> TrainConfig:
    """A run of small steps; `overrides` are fields, `optimizer` and the like dicts of fields."""
    sections: dict[str, Any] = {
        "data": {"train": [data], "max_length": 128, "buckets": 1},
        "optimizer": {"learning_rate": 1e-2, "batch_size": 8, "epochs": 1},
        "report": {"tensorboard": False, "peak_tflops": 1.0, "eval_every": 0},
        "checkpoint": {"every": 0},
    }
    types = {
        "data": DataConfig,
        "optimizer": OptimizerConfig,
        "report": ReportConfig,
        "checkpoint": CheckpointConfig,
    }
    plain: dict[str, Any] = {"dtype": "float32", "tail": 1}
    for name, value in overrides.items():
        if name in types and isinstance(value, dict):
            sections[name] = {**sections.get(name, {}), **value}
        else:
            plain[name] = value
    built = {name: types[name](**values) for name, values in sections.items()}
    config = TrainConfig(str(base), str(output), compilation_cache_dir="", **{**built, **plain})
    check_config(config)
    return config


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    return [record["loss"] for record in metrics(output) if "loss" in record]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars in a folder's TensorBoard events by name: (step, value) in order."""
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            # A record is its length, a checksum, an event, a checksum.
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found
