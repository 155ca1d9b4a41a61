"""Caches of users without a home, and entries of the compilation cache that are damaged."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import zstandard

from pshare_jax import runtime_files
from pshare_jax.runtime_files import (
    cache_folder,
    clean_compilation_cache,
    compilation_cache_folder,
    private_folder,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def anew(tmp_path, monkeypatch):
    """A temporary folder of one's own, and nothing said yet."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    runtime_files._warn.cache_clear()
    runtime_files._own_folder.cache_clear()


@pytest.fixture
def homeless(monkeypatch):
    """A user without HOME and without an entry in passwd, as containers have."""

    def getpwuid(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", getpwuid)


def private(tmp_path) -> Path:
    return tmp_path / "tmp" / f"pshare_jax-{os.geteuid()}"


def test_the_users_folder_comes_first(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder("x") == Path("/somewhere/pshare_jax/x")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("x") == Path.home() / ".cache/pshare_jax/x"


def test_no_home_is_one_line_and_a_private_folder(homeless, tmp_path, caplog):
    assert cache_folder("x") == cache_folder("x") == private(tmp_path) / "x"
    assert caplog.messages == [
        f"this user has no home folder: caches are kept in {private(tmp_path)}"
    ]
    assert private(tmp_path).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("attack", ["link", "writable", "file"])
def test_a_folder_that_others_control_is_not_used(tmp_path, attack):
    """Code is loaded from it."""
    path = private(tmp_path)
    match attack:
        case "link":
            (tmp_path / "theirs").mkdir()
            path.symlink_to(tmp_path / "theirs")
        case "writable":
            path.mkdir()
            path.chmod(0o777)
        case _:
            path.touch()
    folder = private_folder()
    assert folder == private_folder() != path
    assert folder.stat().st_mode & 0o777 == 0o700


def test_the_configured_compilation_cache_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compilation_cache_folder("~/a/b") == tmp_path / "a/b"
    assert (tmp_path / "a/b").is_dir()


def test_a_compilation_cache_without_a_home(homeless, tmp_path, caplog):
    assert compilation_cache_folder("~/x") == private(tmp_path) / "xla"
    (line,) = caplog.messages
    assert line.startswith("~/x: cannot be used as compilation cache (Could not determine home")


def test_a_compilation_cache_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "file").touch()
    folder = compilation_cache_folder(str(tmp_path / "file" / "x"))
    assert folder == private(tmp_path) / "xla"
    assert folder.is_dir()
    assert "(Not a directory)" in caplog.messages[0]


def test_entries_that_cannot_be_read_are_removed(tmp_path, caplog):
    contents = {
        "empty-cache": b"",
        "zeros-cache": bytes(100),
        "cut-cache": zlib.compress(b"program" * 100)[:-3],
        "flipped-cache": bytes([*zlib.compress(b"program")[:-1], 0]),
        "whole-cache": zlib.compress(b"program"),
        "zstd-cut-cache": zstandard.ZstdCompressor().compress(b"a program" * 9)[:-3],
        "zstd-cache": zstandard.ZstdCompressor().compress(b"a program" * 9),
        "empty-atime": b"8 bytes.",
        "whole-atime": b"8 bytes.",
        "other": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert clean_compilation_cache(tmp_path) == 5
    left = {path.name for path in tmp_path.iterdir()} - {"tmp", runtime_files._CHECKED}
    assert left == {"whole-cache", "zstd-cache", "whole-atime", "other"}
    assert caplog.messages == [f"{tmp_path}: removed 5 empty or damaged compiled programs"]
    assert clean_compilation_cache(tmp_path) == 0
    assert clean_compilation_cache(tmp_path / "tmp") == 0
    assert list((tmp_path / "tmp").iterdir()) == []
    assert clean_compilation_cache(tmp_path / "none") == 0


def test_a_byte_that_has_changed_since_is_found_though_the_form_holds(tmp_path, caplog):
    entry = tmp_path / "a-cache"
    entry.write_bytes(zstandard.ZstdCompressor().compress(bytes(range(256))))
    (tmp_path / runtime_files._CHECKED).write_text('{"a-cache": "265 17", "b-cache": 3}')
    assert clean_compilation_cache(tmp_path) == 0
    content = bytearray(entry.read_bytes())
    content[100] ^= 1
    entry.write_bytes(content)
    assert runtime_files._is_whole(bytes(content))
    assert clean_compilation_cache(tmp_path) == 1
    assert not entry.exists()
    entry.write_bytes(zstandard.ZstdCompressor().compress(b"made anew"))
    assert clean_compilation_cache(tmp_path) == 0


PROGRAM = """
import sys, warnings
sys.modules["zstandard"] = None  # zlib's checksum finds a changed byte too
import jax
from pshare_jax.runtime_files import clean_compilation_cache
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
warnings.simplefilter("error" if sys.argv[2] == "clean" else "always")
if sys.argv[2] == "clean":
    print(clean_compilation_cache(sys.argv[1]))
for factor in (2, 3, 4):
    assert jax.jit(lambda x: x * factor + 1)(2.0) == 2 * factor + 1
"""


def test_entries_are_read_once(tmp_path, monkeypatch):
    read = []
    plain = runtime_files._is_whole
    monkeypatch.setattr(runtime_files, "_is_whole", lambda entry: read.append(1) or plain(entry))
    for name in ("a-cache", "b-cache"):
        (tmp_path / name).write_bytes(zlib.compress(name.encode()))
    for _ in range(2):
        assert clean_compilation_cache(tmp_path) == 0
        assert len(read) == 2
    (tmp_path / "b-cache").write_bytes(b"")
    assert clean_compilation_cache(tmp_path) == 1
    assert len(read) == 2
    (tmp_path / runtime_files._CHECKED).write_text("no list")
    assert clean_compilation_cache(tmp_path) == 0
    assert len(read) == 3


def empty(content: bytes) -> bytes:
    return b""


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 8]) + content[middle + 1 :]


def test_jax_makes_the_removed_entries_again(tmp_path):
    """It warns of a damaged entry at every start, and leaves it as it is."""

    def start(how: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "xla"), how]
        return subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )

    start("as it is")
    entries = sorted((tmp_path / "xla").glob("jit__lambda*-cache"))
    assert len(entries) == 3
    damages = (empty, cut, flip)
    damaged = [damage(path.read_bytes()) for damage, path in zip(damages, entries, strict=True)]
    for path, content in zip(entries, damaged, strict=True):
        path.write_bytes(content)
    assert start("as it is").stderr.count("Error reading persistent compilation cache") == 3
    assert [path.read_bytes() for path in entries] == damaged
    assert start("clean").stdout == "3\n"
    assert all(zlib.decompress(path.read_bytes()) for path in entries)
