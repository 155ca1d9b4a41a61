"""Peak memory of the conversions: that of a deep model is that of a shallow one."""

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

from pshare_jax.models.config import ModelConfig
from pshare_jax.models.weights import weight_specs
from tests.convert.helpers import gguf_config, random_weights, write_gguf, write_hf_folder

LAYERS = {"shallow": 1, "deep": 9}


def config_of(layers: int) -> ModelConfig:
    """Wide enough that a layer is large beside what else a conversion needs now and then."""
    return gguf_config(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=2048,
        num_layers=layers,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    )


def model_bytes(layers: int) -> int:
    return 4 * sum(int(np.prod(spec.shape)) for spec in weight_specs(config_of(layers)).values())


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
def folders(tmp_path_factory) -> dict[str, Path]:
    """Folders with a model as Hugging Face writes it, `hf`, and as a GGUF file, `m.gguf`."""
    one = random_weights(config_of(1))
    folders = {}
    for kind, layers in LAYERS.items():
        config = config_of(layers)
        # One layer's values serve for all of them.
        weights = {
            name: one[re.sub(r"layers\.\d+", "layers.0", name)] for name in weight_specs(config)
        }
        folder = folders[kind] = tmp_path_factory.mktemp(kind)
        write_hf_folder(folder / "hf", config, weights)
        write_gguf(folder / "m.gguf", config, weights, QuantizationType.Q8_0)
    return folders


@pytest.mark.slow
def test_no_conversion_holds_a_model(folders):
    """In every direction, eight more layers take less than three quarters of what they are; also
    for `verify`, however its two models come. All but that, which starts JAX, stay below 400 MB
    with interpreter and libraries."""
    added = model_bytes(LAYERS["deep"]) - model_bytes(LAYERS["shallow"])
    assert 120e6 < added < 140e6
    peaks = {}
    with converter() as peak_bytes:
        # The first of a kind also takes what it leaves: libraries, and what is compiled.
        for name, command in {
            "import": ("import", "hf", "base"),
            "gguf": ("import", "m.gguf", "from_gguf"),
            "decoder": ("decoder", "base", "copy"),
            "export": ("export", "base", "out"),
            "check": ("inspect", "--check", "base"),
            "verify": ("verify", "base", "hf"),
        }.items():
            for kind, folder in folders.items():
                words = [
                    str(folder / word) if i and word[0] != "-" else word
                    for i, word in enumerate(command)
                ]
                peaks[name, kind] = peak_bytes(*words)
    growth = {
        name: (peaks[name, "deep"] - peaks[name, "shallow"]) / added
        for name, kind in peaks
        if kind == "deep"
    }
    assert {name: share for name, share in growth.items() if share > 0.75} == {}
    large = {key: peak for key, peak in peaks.items() if key[0] != "verify" and peak > 400e6}
    assert large == {}
