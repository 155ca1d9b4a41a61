"""The documentation's site: every page has its place, and what it documents is there."""

from __future__ import annotations

import importlib
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
API_PAGES = sorted((DOCS / "api").glob("*.md"))
HOOKS = runpy.run_path(str(DOCS / "site_hooks.py"))


def flat(nav: list[Any]) -> list[str]:
    """Pages in order."""
    pages: list[str] = []
    for entry in nav:
        pages += [entry] if isinstance(entry, str) else flat(next(iter(entry.values())))
    return pages


def test_every_page_has_its_place_once():
    pages = flat(HOOKS["on_config"](SimpleNamespace(docs_dir=str(DOCS))).nav)
    assert sorted(pages) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
    assert pages[0] == "index.md"
    decisions = [page for page in pages if page.startswith("decisions/")]
    assert decisions[:2] == ["decisions/README.md", "decisions/001-pure-cores.md"]


def test_a_page_that_no_section_names_is_not_lost(tmp_path):
    for name in ("index.md", "new.md"):
        (tmp_path / name).write_text("")
    nav = HOOKS["on_config"](SimpleNamespace(docs_dir=str(tmp_path))).nav
    assert {"Also": ["new.md"]} in nav


@pytest.mark.parametrize("page", API_PAGES, ids=lambda path: path.stem)
def test_what_the_reference_names_is_there(page):
    names = re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)
    assert names
    for name in names:
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError:
            module, _, attribute = name.rpartition(".")
            found = getattr(importlib.import_module(module), attribute)
        assert found.__doc__, name


@pytest.mark.parametrize(
    ("link", "shown"),
    [
        ("[modules](../modules/README.md)", "modules (`modules/README.md`)"),
        ("[figures](results/)", "figures (`docs/results`)"),
        ("[one](results/soak.json)", "[one](results/soak.json)"),
        ("[training](training.md#loss)", "[training](training.md#loss)"),
        ("[there](https://x.org/a/)", "[there](https://x.org/a/)"),
        ("[below](#part)", "[below](#part)"),
    ],
)
def test_links_that_leave_the_folder_become_names(link, shown, caplog):
    page = SimpleNamespace(file=SimpleNamespace(abs_src_path=DOCS / "x.md", src_path="x.md"))
    config = SimpleNamespace(docs_dir=str(DOCS))
    assert HOOKS["on_page_markdown"](link, page=page, config=config, files=None) == shown
    assert caplog.text == ""


def test_one_that_leads_nowhere_is_a_warning(caplog):
    page = SimpleNamespace(file=SimpleNamespace(abs_src_path=DOCS / "x.md", src_path="x.md"))
    config = SimpleNamespace(docs_dir=str(DOCS))
    HOOKS["on_page_markdown"]("[a](../no/such.md)", page=page, config=config, files=None)
    assert "x.md: ../no/such.md does not exist" in caplog.text
