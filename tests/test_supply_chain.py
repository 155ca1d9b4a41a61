"""The lock file, and what is made of pip-audit's findings."""

import json
import re
import runpy
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "requirements.lock").read_text()
LOCKED = ("train", "convert", "eval", "otel", "sandbox")
audit = runpy.run_path(str(ROOT / ".ci/audit.py"))


def locked() -> dict[str, str]:
    pins = re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", LOCK, re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in pins}


def test_every_requirement_is_locked_to_a_version_that_will_do():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pins = locked()
    named = [text for extra in LOCKED for text in extras[extra]]
    for text in (*project["dependencies"], *named):
        requirement = Requirement(text)
        version = pins[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version, prereleases=True), text


def test_every_pin_has_hashes_and_nothing_names_a_host():
    entries = re.split(r"^(?=[A-Za-z0-9_.-]+==)", LOCK, flags=re.MULTILINE)[1:]
    assert len(entries) == len(locked()) > 40
    for entry in entries:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry
    assert "://" not in LOCK
    assert not re.search(r"^\s*(-i|--index-url|--extra-index-url|--find-links|-f)\b", LOCK, re.M)


PACKAGE = {"name": "idna", "version": "3.4", "vulns": []}
BAD = {**PACKAGE, "vulns": [{"id": "PYSEC-1", "fix_versions": ["3.7"], "description": "x"}]}
SKIPPED = {"name": "idna", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("output", "code", "line"),
    [
        ("", 0, "audit: skipped, since pip-audit cannot reach its data"),
        ("Could not connect", 0, "audit: skipped, since pip-audit cannot reach its data"),
        ([SKIPPED], 0, "audit: skipped, since nothing is known here about any of the packages"),
        ([PACKAGE, SKIPPED], 0, "audit: 1 of 2 packages were looked up, 0 known vulnerabilities"),
        ([BAD], 1, "audit: idna 3.4: PYSEC-1, mended in 3.7"),
    ],
)
def test_what_is_made_of_the_findings(output, code, line):
    text = output if isinstance(output, str) else json.dumps({"dependencies": output})
    got, lines = audit["verdict"](text)
    assert (got, lines[0]) == (code, line)
