"""What the README says about the tree is true."""

from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_tree_names_every_module():
    tree = (ROOT / "README.md").read_text().partition("## What is where")[2]
    for path in (ROOT / "pshare_jax").rglob("*.py"):
        if path.name != "__init__.py":
            assert f" {path.name} " in tree, path
