"""Peak memory of the conversions on a model that is large beside the interpreter."""

from __future__ import annotations

import re
import subprocess
import sys
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

# getrusage would not do: its peak survives exec, so a child starts with its parent's.
MEASURED = """
import sys
from pathlib import Path
from pshare_jax.convert.__main__ import main
code = main(sys.argv[1:])
lines = Path("/proc/self/status").read_text().splitlines()
peak = next(line for line in lines if line.startswith("VmHWM"))
print("PEAK", 1024 * int(peak.split()[1]))
sys.exit(code)
"""


def peak_bytes(*args) -> int:
    """Peak resident memory of a whole conversion process, interpreter and libraries included."""
    command = [sys.executable, "-c", MEASURED, *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split("PEAK")[1])


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """One layer's values serve for all of them."""
    layer = random_weights(gguf_config(**{**vars(CONFIG), "num_layers": 1}))
    return {name: layer[re.sub(r"layers\.\d+", "layers.0", name)] for name in weight_specs(CONFIG)}


@pytest.fixture(scope="module")
def imported(weights, tmp_path_factory) -> tuple[Path, int]:
    """A folder with the model as Hugging Face writes it, `hf`, and imported, `base`; and the peak
    of that import."""
    folder = tmp_path_factory.mktemp("large")
    source = write_hf_folder(folder / "hf", CONFIG, weights)
    return folder, peak_bytes("import", source, folder / "base")


@pytest.mark.slow
def test_peak_memory_is_bounded_by_the_model(weights, imported, tmp_path):
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
    least = peak_bytes("verify", tiny, tiny)
    assert peak_bytes("verify", folder / "base", folder / "hf") - least < 0.75 * MODEL_BYTES
