"""Teams of threads: every iteration once, and the same bits, whatever their number."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.cluster.cpus import kept_to
from pshare_jax.kernels.native import library, loop_trace
from pshare_jax.models.decoder import init_weights
from pshare_jax.models.packed import PackedDecoder, pack_weights
from tests.helpers import on_device, tiny_config

ROOT = Path(__file__).parents[2]
CONFIG = tiny_config(hidden_size=96, intermediate_size=200, num_heads=6, head_dim=16)
PAGE, WIDTH = 16, 20
# Of rows: a prompt that goes on, one that begins, one of a single token.
START, LENS = np.asarray([70, 0, 5], np.int32), np.asarray([200, 130, 1], np.int32)
TOKENS = 200


@pytest.fixture(scope="module")
def stress(tmp_path_factory) -> Path:
    """A program that runs loops and counts what was not done once."""
    program = tmp_path_factory.mktemp("threads") / "threads"
    command = [library._compiler(), "-O1", "-std=c++17", "-pthread", "-w", f"-I{library.SOURCES}"]
    subprocess.run(
        [*command, str(Path(__file__).with_name("threads.cc")), "-o", str(program)],
        check=True,
        timeout=200,
    )
    return program


@pytest.mark.parametrize("threads", [1, 2, 3, 16, 64])
def test_every_iteration_runs_once(stress: Path, threads: int):
    """Also with many more threads than CPUs, and with several callers at once."""
    done = subprocess.run(
        [str(stress), "150"],
        env={**os.environ, "PSHARE_THREADS": str(threads)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"{threads} threads, 0 faults\n"), done.stderr


def test_threads_follow_the_cpus_that_a_process_may_use(stress: Path):
    cpu = min(os.sched_getaffinity(0))
    environment = {key: value for key, value in os.environ.items() if key != "PSHARE_THREADS"}
    with kept_to(frozenset({cpu})):
        done = subprocess.run(
            [str(stress), "1"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.stdout == "1 threads, 0 faults\n", done.stderr


@jax.jit
def step(weights, tokens, positions, rows, pages):
    decoder = PackedDecoder(CONFIG, weights, None, None)
    hidden, pages = decoder.hidden(tokens, positions, pages, rows)
    last = jnp.maximum(rows[2] - 1, 0)
    ends = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return *decoder.logits(ends, rows[2], jnp.asarray(True)), pages


def bits() -> str:
    """A hash of all that a chunk of prefill and two steps of decode give."""
    rng = np.random.default_rng(0)
    config = CONFIG
    weights = pack_weights(config, init_weights(config, 1, jnp.dtype("bfloat16")))
    table = rng.permutation(np.arange(1, 3 * WIDTH + 1)).reshape(3, WIDTH).astype(np.int32)
    shape = (3 * WIDTH + 1, 2, config.num_kv_heads, PAGE, config.head_dim)
    pages = tuple(
        on_device(rng.standard_normal(shape), "bfloat16") for _ in range(config.num_layers)
    )
    start, lens, tokens = START, LENS, rng.integers(0, config.vocab_size, (3, TOKENS))
    digest = hashlib.sha256()
    for _ in range(3):
        positions = start[:, None] + np.arange(tokens.shape[1], dtype=np.int32)
        rows = (table, start, lens)
        logits, best, pages = step(weights, tokens.astype(np.int32), positions, rows, pages)
        for array in (logits, best, *pages):
            digest.update(np.asarray(array).tobytes())
        start, lens = start + lens, np.ones(3, np.int32)
        tokens = np.asarray(best)[:, None]
    return digest.hexdigest()


def test_bits_do_not_depend_on_threads():
    expected, counts = bits(), []
    for threads in (1, 2, 3, 8, 64):
        with loop_trace.traced(threads) as traced:
            assert bits() == expected
        most = max(len(loop.seconds) for call in traced.calls for loop in call.loops)
        counts.append(most)
    assert counts == sorted(counts), "cut finer, where there are more threads"
    assert counts[0] < counts[-1]
    done = subprocess.run(
        [sys.executable, "-c", "from tests.kernels.test_threads import bits; print(bits())"],
        env={**os.environ, "PSHARE_THREADS": "64"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.stdout.strip() == expected, done.stderr
