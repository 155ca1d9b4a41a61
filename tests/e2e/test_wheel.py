"""The wheel, installed outside of the checkout and without the extras, serves a model."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import pytest

from pshare_jax.serve.process import running_server
from tests.e2e.conftest import ROOT, write_config

pytestmark = pytest.mark.e2e

SECONDS = 240


def run(*command: str, **options) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=SECONDS, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=ROOT)
    (file,) = folder.iterdir()
    return file


@pytest.fixture
def installed(wheel, tmp_path, monkeypatch) -> Path:
    """A folder of the wheel's files that every Python process finds before the checkout."""
    target = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps")
    run(*pip, "--target", str(target), str(wheel), cwd=tmp_path)
    # Read at every start of Python: the packages of the extras are not there.
    (target / "sitecustomize.py").write_bytes((ROOT / "tests/package/serving_only.py").read_bytes())
    monkeypatch.setenv("PYTHONPATH", str(target))
    monkeypatch.chdir(tmp_path)
    return target


def test_what_is_in_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (about,) = (name for name in names if name.endswith("/METADATA"))
        metadata = archive.read(about).decode()
    assert {"pshare_jax/py.typed", "pshare_jax/cli.py"} <= names
    folders = {name.split("/")[1] for name in names if name.startswith("pshare_jax/")}
    assert folders.isdisjoint({"bench", "study"})
    in_tree = {path.name for path in (ROOT / "pshare_jax").iterdir()} - {"__pycache__"}
    assert in_tree - folders == {"bench", "study"}
    # Whatever is not Python (sources of kernels, pages) is there too.
    assert {name for name in names if name.startswith("pshare_jax/")} >= {
        str(path.relative_to(ROOT))
        for path in (ROOT / "pshare_jax").rglob("*")
        if path.is_file() and not {"__pycache__", "bench", "study"} & set(path.parts)
    }
    needed = [
        line.removeprefix("Requires-Dist: ")
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]
    names = {line.replace("<", ">").replace("[", ">").partition(">")[0] for line in needed}
    assert names.isdisjoint({"optax", "grain", "tensorboardx", "scipy", "gguf", "matplotlib"})
    assert {"jax", "flax", "aiohttp"} <= names


def test_it_serves(installed, tiny_folder, monkeypatch):
    script = installed / "bin/pshare"
    assert run(str(script), "--version").startswith("pshare ")
    where = run(sys.executable, "-c", "import pshare_jax; print(pshare_jax.__file__)")
    assert where == f"{installed / 'pshare_jax/__init__.py'}\n"
    # One device, one batch size and one chunk length: nothing that takes long to compile.
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    config = write_config(
        tiny_folder,
        models=[{"name": "coder", "checkpoint": str(tiny_folder / "coder")}],
        prefill={"chunk_buckets": [16]},
        decode={"batch_buckets": [1], "max_num_seqs": 1, "replay_buckets": [16]},
    )
    body = {"model": "coder", "prompt": "hello", "max_tokens": 4, "ignore_eos": True}
    with running_server([f"--config={config}"], SECONDS, (str(script), "serve")) as url:
        request = urllib.request.Request(
            f"{url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            usage = json.load(answer)["usage"]
    assert usage["completion_tokens"] == 4
