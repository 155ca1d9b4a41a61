"""Set-up of the whole run: platform, virtual devices and a compilation cache, before JAX starts."""

import gc
import os
from pathlib import Path

# Tests compile hundreds of programs and run each for milliseconds: before jax is imported, and for
# the processes that tests start.
os.environ["XLA_FLAGS"] = " ".join(
    (os.environ.get("XLA_FLAGS", ""), "--xla_llvm_disable_expensive_passes=true")
).strip()

import jax
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--platform",
        choices=("cpu", "tpu", "cuda"),
        default="cpu",
        help="where JAX runs; tests marked `tpu` and `gpu` need theirs",
    )


def pytest_collection_finish() -> None:
    """What was imported stays: garbage collections need not walk it again and again."""
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    jax.config.update("jax_platforms", config.getoption("--platform"))


jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".cache/xla-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
