"""What the documents say about the tree is true."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_tree_is_that_of_the_files():
    """Otherwise: python docs/make_tree.py."""
    made = runpy.run_path(str(ROOT / "docs/make_tree.py"))["tree"]()
    assert (ROOT / "docs/tree.md").read_text() == made


def test_the_readme_names_every_folder():
    text = (ROOT / "README.md").read_text().partition("## What is where")[2]
    for path in (ROOT / "pshare_jax").iterdir():
        if (path / "__init__.py").is_file():
            assert path.name in text, path
