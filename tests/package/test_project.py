"""What people meet first: documents whose links lead somewhere, and forms that can be filled in."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import pshare_jax

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "examples/*.md", "modules/*.md")
    for path in ROOT.glob(pattern)
)
FORMS = ("bug", "client", "feature")


def anchor(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    text = re.sub(r"[`*]", "", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_somewhere(document):
    text = re.sub(r"^```.*?^```", "", (ROOT / document).read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, fragment = link.partition("#")
        if ":" in target:
            continue
        path = (ROOT / document).parent / target if target else ROOT / document
        assert path.exists(), f"{document}: {link}"
        if fragment:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert fragment in map(anchor, headings), f"{document}: {link}"


@pytest.mark.parametrize("name", FORMS)
def test_issue_forms_are_whole(name):
    form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
    assert {"name", "description", "labels", "body"} == set(form)
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids) > 1
    assert all(field["type"] in ("input", "textarea") for field in form["body"])
    assert all(field["attributes"]["label"] for field in form["body"])
    assert any(field.get("validations", {}).get("required") for field in form["body"])


def test_hooks_call_tools_of_the_test_extra():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    programs = {hook["entry"].split()[0] for hook in repo["hooks"]}
    assert programs == {".venv/bin/ruff", ".venv/bin/lint-imports", ".venv/bin/python"}


def test_the_changelog_knows_the_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert f"\n## {pshare_jax.__version__}\n" in text
    assert text.index("## Unreleased") < text.index(f"## {pshare_jax.__version__}")


def test_the_readme_is_read_in_a_sitting():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_no_module_is_named_like_one_of_python():
    """A file that is run as a script has its folder first on the path: its neighbours shadow."""
    modules = (ROOT / "pshare_jax").rglob("*.py")
    assert not [path for path in modules if path.stem in sys.stdlib_module_names]


def test_every_target_of_make_that_is_shown_is_there():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        shown = re.findall(r"^make ([a-z][a-z0-9-]*)|`make ([a-z][a-z0-9-]*)", text, re.MULTILINE)
        for target in map("".join, shown):
            # A path is a target too, of a rule with a pattern.
            assert target in targets | {"checkpoints"}, f"{document}: make {target}"


def test_python_versions_are_those_that_are_classified():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    prefix = "Programming Language :: Python :: "
    versions = [c.removeprefix(prefix) for c in project["classifiers"] if c.startswith(prefix)]
    assert versions == ["3.11", "3.12", "3.13"]
    assert project["requires-python"] == f">={versions[0]}"
