"""Peak memory of the conversions on a model that is large beside the interpreter."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QuantizationType

from pshare_jax.models.weights import weight_specs
from tests.convert.helpers import gguf_config, random_weights, write_gguf, write_hf_folder

CONFIG = gguf_config(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=2048,
    num_layers=18,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
)
MODEL_BYTES = 4 * sum(int(np.prod(spec.shape)) for spec in weight_specs(CONFIG).values())

# One process for several, since imports take as long as a conversion; what one conversion leaves
# counts for the next. getrusage would not do: its peak survives exec, so a child starts with its
# parent's.
MEASURED = """
import gc
import json
import sys
from pathlib import Path
from pshare_jax.convert.__main__ import main
from pshare_jax.runtime.host_memory import return_freed_memory
for line in sys.stdin:
    gc.collect()
    return_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    code = main(json.loads(line))
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in lines if line.startswith("VmHWM"))
    print("PEAK", code, 1024 * int(peak.split()[1]), flush=True)
"""


@contextmanager
def converter() -> Iterator[Callable[..., int]]:
    """A process of conversions: takes the command line of one, and returns its peak resident
    memory, interpreter and libraries included."""
    with subprocess.Popen(
        [sys.executable, "-c", MEASURED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        answers = process.stdout

        def measured(*args: str | Path) -> int:
            print(json.dumps([str(arg) for arg in args]), file=process.stdin, flush=True)
            said = []
            for line in answers:
                if line.startswith("PEAK "):
                    code, peak = map(int, line.split()[1:])
                    assert code == 0, "".join(said)
                    return peak
                said.append(line)
            raise AssertionError("".join(said))

        yield measured
        process.stdin.close()
        assert process.wait(60) == 0


@pytest.fixture(scope="module")
def peak_bytes() -> Iterator[Callable[..., int]]:
    with converter() as measured:
        yield measured


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """One layer's values serve for all of them."""
    layer = random_weights(gguf_config(**{**vars(CONFIG), "num_layers": 1}))
    return {name: layer[re.sub(r"layers\.\d+", "layers.0", name)] for name in weight_specs(CONFIG)}


@pytest.fixture(scope="module")
def imported(weights, peak_bytes, tmp_path_factory) -> tuple[Path, int]:
    """A folder with the model as Hugging Face writes it, `hf`, and imported, `base`; and the peak
    of that import."""
    folder = tmp_path_factory.mktemp("large")
    source = write_hf_folder(folder / "hf", CONFIG, weights)
    return folder, peak_bytes("import", source, folder / "base")


@pytest.mark.slow
def test_peak_memory_is_bounded_by_the_model(weights, imported, peak_bytes, tmp_path):
    """At most 1.3 times the larger of source and result, for every direction."""
    assert 300e6 < MODEL_BYTES < 400e6
    folder, peak = imported
    write_gguf(tmp_path / "m.gguf", CONFIG, weights, QuantizationType.Q8_0)
    peaks = {
        "import": peak,
        "gguf": peak_bytes("import", tmp_path / "m.gguf", tmp_path / "from_gguf"),
        "decoder": peak_bytes("decoder", folder / "base", tmp_path / "copy"),
        "export": peak_bytes("export", folder / "base", tmp_path / "out"),
        "check": peak_bytes("inspect", "--check", folder / "base"),
    }
    assert {name: peak for name, peak in peaks.items() if peak > 1.3 * MODEL_BYTES} == {}


@pytest.mark.slow
def test_verify_holds_neither_model(imported, tmp_path):
    """Beyond what it takes for a model of no size: less than one of the two, however they come."""
    tiny = write_hf_folder(tmp_path / "tiny", gguf_config(), random_weights(gguf_config()))
    folder, _ = imported
    with converter() as peak_bytes:
        least = peak_bytes("verify", tiny, tiny)
        assert peak_bytes("verify", folder / "base", folder / "hf") - least < 0.75 * MODEL_BYTES
