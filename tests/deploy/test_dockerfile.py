"""The image: its Dockerfile is sound, and says what the manifests and the code say."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from pshare_jax.cli import COMMANDS
from pshare_jax.serve import app
from tests.deploy.rendering import DEPLOY, PLATFORMS, kustomized, named, pods, program

pytestmark = pytest.mark.deploy

ROOT = Path(__file__).parents[2]
TEXT = (DEPLOY / "Dockerfile").read_text()
IGNORED = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()


def instruction(name: str) -> str:
    """What follows the last instruction of that name."""
    return re.findall(rf"^{name} (.*)$", TEXT.replace("\\\n", " "), re.MULTILINE)[-1]


def test_hadolint_finds_no_fault() -> None:
    done = subprocess.run(
        [program("hadolint"), "--no-color", str(DEPLOY / "Dockerfile")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_it_runs_as_the_user_of_the_manifests() -> None:
    deployment = named(kustomized("kustomize/overlays/cpu"), "Deployment", "pshare-frontend")
    security = pods(deployment)[0]["spec"]["securityContext"]
    assert instruction("USER") == f"{security['runAsUser']}:{security['runAsGroup']}"


def test_it_serves_and_is_asked_for_its_health_on_one_port() -> None:
    command = instruction("CMD").removeprefix("[").removesuffix("]").replace('"', "").split(", ")
    assert instruction("ENTRYPOINT") == '["pshare"]'
    assert command[0] in COMMANDS
    port = dict(flag.split("=") for flag in command[1:])["--port"]
    ((asked, path),) = re.findall(r"127\.0\.0\.1:(\d+)(/\w+)", instruction("HEALTHCHECK"))
    assert asked == port
    assert path in app._PUBLIC_PATHS
    assert port in instruction("EXPOSE").split()


def test_what_it_copies_is_there_and_not_ignored() -> None:
    copied = re.findall(r"^COPY (?!--)(.*) \S+$", TEXT, re.MULTILINE)
    sources = [source for line in copied for source in line.split()]
    assert "pshare_jax" in sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in IGNORED
    assert IGNORED[1] == "*"


def test_the_lock_file_is_for_its_python() -> None:
    ((version),) = re.findall(r"^ARG PYTHON_VERSION=(\S+)$", TEXT, re.MULTILINE)
    assert f"with Python {version}\n" in (ROOT / "requirements.lock").read_text()


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_images_of_the_overlays_can_be_built(platform: str) -> None:
    deployment = named(
        kustomized(f"kustomize/overlays/{platform}"), "Deployment", "pshare-frontend"
    )
    _, tag = pods(deployment)[0]["spec"]["containers"][0]["image"].split(":")
    assert re.search(rf"^FROM \S+ AS system-{tag}$", TEXT, re.MULTILINE)
    assert re.search(rf"^ +{tag}\) extra=", TEXT, re.MULTILINE)
