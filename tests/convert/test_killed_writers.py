"""What a conversion that was killed leaves, and who clears it away."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time

import pytest

from pshare_jax.convert.conversions import import_model
from pshare_jax.convert.files import atomic_folder
from pshare_jax.convert.orbax import read_manifest
from tests.convert.helpers import gguf_config, random_weights, write_gguf

WRITER = """
import sys, time
from pshare_jax.convert.files import atomic_folder
with atomic_folder(sys.argv[1]) as folder:
    (folder / "weights").mkdir()
    (folder / "weights" / "x").write_text("x")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path):
    """A process in the middle of writing `tmp_path/out`."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, tmp_path / "out"], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    yield process
    process.kill()
    process.communicate()


def test_the_folder_of_a_killed_writer_is_removed(tmp_path, writer, caplog):
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    (left,) = tmp_path.iterdir()
    with atomic_folder(tmp_path / "other"):
        assert left.exists()
    with caplog.at_level(logging.WARNING), atomic_folder(tmp_path / "out"):
        assert not left.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]
    assert caplog.messages == [f"{left}: removed, its writer is dead"]


@pytest.mark.parametrize("old", [True, False])
def test_the_folder_of_a_writer_that_lives_is_kept(tmp_path, writer, old, monkeypatch):
    (left,) = tmp_path.iterdir()
    if old:
        monkeypatch.setattr("pshare_jax.convert.files.LOCKED_AFTER_SECONDS", 0)
    with atomic_folder(tmp_path / "out"):
        assert (left / "weights" / "x").exists()
    assert left.exists()


def test_a_folder_that_is_not_locked_yet_is_kept_for_a_minute(tmp_path, monkeypatch):
    young = tmp_path / f".out.{os.getpid()}-abc.part"
    young.mkdir()
    foreign = [
        tmp_path / ".out.abc.part",
        tmp_path / ".other.1-abc.part",
        tmp_path / "out.1-a.part",
    ]
    for folder in foreign:
        folder.mkdir()
    with atomic_folder(tmp_path / "out"):
        assert young.exists()
    (tmp_path / "out").rmdir()
    later = time.time() + 61
    monkeypatch.setattr("pshare_jax.convert.files.time.time", lambda: later)
    with atomic_folder(tmp_path / "out"):
        assert not young.exists()
        assert all(folder.exists() for folder in foreign)


def test_import_after_kill(tmp_path):
    """The command itself, killed while it writes."""
    config = gguf_config(num_layers=30)
    write_gguf(tmp_path / "m.gguf", config, random_weights(config))
    command = [sys.executable, "-m", "pshare_jax.convert", "import", tmp_path / "m.gguf"]
    dest = tmp_path / "dest" / "out"
    process = subprocess.Popen([*command, dest], stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(dest.parent.glob(".out.*.part/weights/layers.*")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert [path.suffix for path in dest.parent.iterdir()] == [".part"]
    import_model(tmp_path / "m.gguf", dest)
    assert list(dest.parent.iterdir()) == [dest]
    assert read_manifest(dest).config == config
