"""A tiny engine, and a server in front of that very engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pshare_jax.convert.orbax import write_decode, write_prefill
from pshare_jax.engine.offline import Engine
from pshare_jax.models.decoder import init_weights
from tests.helpers import tiny_config
from tests.serve.server import running_server
from tests.text.tiny import write_byte_level


@pytest.fixture(scope="session")
def serve_config(tmp_path_factory) -> Path:
    """A serving configuration with models `base` and `coder`."""
    folder = tmp_path_factory.mktemp("evals")
    config = tiny_config(vocab_size=416, max_position_embeddings=512)
    tokenizer = write_byte_level(folder / "tokenizer")
    files = {path.name: path.read_bytes() for path in tokenizer.iterdir()}
    base = write_prefill(folder / "prefill", config, init_weights(config, 0), files)
    write_decode(folder / "coder", base, init_weights(config, 1), cache_conditioned=True)
    path = folder / "serve.yaml"
    fields = {
        "base": str(folder / "prefill"),
        "models": [
            {"name": "base"},
            {"name": "coder", "checkpoint": str(folder / "coder"), "tool_parser": "hermes"},
        ],
        "max_model_len": 512,
        "page_size": 16,
        "compilation_cache_dir": "",
        "prefill": {"chunk_buckets": [64]},
        "decode": {"batch_buckets": [4], "max_num_seqs": 4, "replay_buckets": [4]},
        "server": {"port": 0},
    }
    path.write_text(yaml.safe_dump(fields))
    return path


@pytest.fixture(scope="package")
def engine(serve_config) -> Iterator[Engine]:
    with Engine.from_config(serve_config) as engine:
        yield engine


@pytest.fixture(scope="package")
def url(engine) -> Iterator[str]:
    with running_server(engine.orchestrator, start=False) as client:  # type: ignore[arg-type]
        yield client.url
