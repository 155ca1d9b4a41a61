"""The code for CPUs that this one is not, and with what stands for the parts that it lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Each compiles the whole library anew, and runs hundreds of tests on it.
pytestmark = [pytest.mark.cpus, pytest.mark.slow]


TWIN = """
import sys
from pshare_jax.kernels.native import library
library.FLAGS = tuple("-O1" if f == "-O3" else f for f in library.FLAGS)
library.FLAGS += ("-DPSHARE_TILES_TWIN",)
loaded = library.require_library()
assert (loaded.panel_columns, loaded.multiplier) == (32, "twin"), loaded
import pytest
layers = "(same_numbers or unlike_shape or rows_of_the_base) and (panel or odd or gpt or gemma2)"
of_packed = "beside_it or best_token or tied_head"
names = f"({layers} or {of_packed} or cpu_ffi or cpp or bits or test_bfloat16)"
names += " and not float32 and not dynamic"
files = ["tests/models/test_packed.py", "tests/models/test_packed_eight_bits.py"]
files += ["tests/kernels/test_matmul.py", "tests/kernels/test_paged_attention.py"]
files += ["tests/engine/test_cpu_backend.py"]
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *files, "-k", names]))
"""


AVX2 = """
import os, sys
from pshare_jax.kernels.native import library
library.FLAGS = tuple("-O1" if f == "-O3" else f for f in library.FLAGS)
loaded = library.require_library()
assert loaded.panel_columns == 16, loaded
import pytest
names = "test_same_numbers and (qwen2 or odd) or unlike_shape and odd or beside_it"
names += " or test_numbers and cpu_ffi and 160"
files = ["tests/models/test_packed.py", "tests/models/test_packed_eight_bits.py"]
files += ["tests/kernels/test_matmul.py"]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *files, "-k", names]))
"""


def run_in_another_process(script: str, cache: Path, **variables: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the flags are those of x86-64")
def test_the_code_for_cpus_without_avx512(tmp_path):
    run_in_another_process(AVX2, tmp_path, PSHARE_MARCH="x86-64-v3")


def test_the_code_for_cpus_with_a_matrix_unit(tmp_path):
    """All of it but the instructions themselves, which test_tiles.py runs: with the unit's twin."""
    run_in_another_process(TWIN, tmp_path)
