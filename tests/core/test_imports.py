"""The core knows no devices, threads or clocks."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pshare_jax.core

FOLDER = Path(pshare_jax.core.__file__).parent
FILES = sorted(FOLDER.rglob("*.py"))

BLOCKED = """
import importlib, pkgutil, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"jax", "jaxlib"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import pshare_jax.core as core
names = [m.name for m in pkgutil.walk_packages(core.__path__, core.__name__ + ".")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def test_every_module_of_the_core_is_imported_without_jax() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(FILES) - 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_no_file_of_the_core_imports_threads_or_clocks(path: Path) -> None:
    imported: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    forbidden = {"threading", "time", "datetime", "asyncio", "concurrent", "queue", "jax", "jaxlib"}
    assert imported.isdisjoint(forbidden)
