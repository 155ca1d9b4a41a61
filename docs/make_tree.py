"""Writes docs/tree.md: what each file of the package is, from its own first words.

Run from the repository's folder: python docs/make_tree.py
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pshare_jax"
TARGET = ROOT / "docs/tree.md"
HEAD = """\
# What is where

Made by `python docs/make_tree.py` from the first sentence of each file. How the parts work
together is in [architecture.md](architecture.md).
"""


def first_sentence(path: Path) -> str:
    """The first sentence of a file's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    line = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"(?<=[a-z0-9)`\"'])\. ", line)[0].rstrip(".")


def tree() -> str:
    """The page."""
    parts = [HEAD]
    for folder in sorted({path.parent for path in PACKAGE.rglob("*.py")}):
        files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
        about = first_sentence(folder / "__init__.py")
        parts.append(f"## {folder.relative_to(ROOT)}/\n\n{about}.\n")
        if files:
            rows = [f"| `{path.name}` | {_cell(first_sentence(path))} |" for path in files]
            parts.append("\n".join(["| file | what it is |", "|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    TARGET.write_text(tree())
