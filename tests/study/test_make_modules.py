"""`make modules` replaces the repository's modules once all new ones are there, and not before."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = ["code", "family", "tools"]

# Stands for Python: exports what FAIL does not name, trains nothing.
PYTHON = """#!/bin/sh
[ "$2" = pshare_jax.convert ] || exit 0
case "$4" in *"$FAIL"*) echo "no such module" >&2; exit 2;; esac
mkdir -p "$5" && echo new > "$5/adapter_model.safetensors"
"""


def make_modules(folder: Path, fail: str) -> int:
    done = subprocess.run(
        ["make", "modules"],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "FAIL": fail},
        check=False,
        capture_output=True,
        timeout=60,
    )
    return done.returncode


def modules(folder: Path) -> dict[str, str]:
    files = sorted((folder / "modules").glob("**/adapter_model.safetensors"))
    return {str(f.relative_to(folder / "modules").parent): f.read_text() for f in files}


@pytest.fixture
def clone(tmp_path) -> Path:
    """The Makefile, with all that the target needs in place."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    (tmp_path / "checkpoints/smollm2-135m").mkdir(parents=True)
    for made in (".venv/.python", ".venv/.run", ".venv/.study"):
        (tmp_path / made).touch()
    (tmp_path / "checkpoints/smollm2-135m/pshare.json").touch()
    for name in NAMES:
        folder = tmp_path / "modules/smollm2-135m" / name
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_text("old\n")
    return tmp_path


def test_a_failed_export_leaves_the_old_modules(clone):
    # The last of the three.
    assert make_modules(clone, fail="code-lora") != 0
    found = modules(clone)
    assert {f"smollm2-135m/{name}" for name in NAMES} <= set(found)
    assert [found[f"smollm2-135m/{name}"] for name in NAMES] == ["old\n"] * 3
    # What it left does not stand in the way.
    assert make_modules(clone, fail="nothing") == 0
    assert modules(clone) == {f"smollm2-135m/{name}": "new\n" for name in NAMES}
