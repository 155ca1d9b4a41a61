"""Compiling the C++ kernels: once, whole, for this CPU; and doing without them."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pshare_jax.errors import ConfigError
from pshare_jax.kernels.backends import backend_for
from pshare_jax.kernels.native import compiling, library
from pshare_jax.kernels.native.instructions import lacking, used

ROOT = Path(__file__).parents[2]


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch):
    """Loads the library as a new process would."""
    monkeypatch.setattr(library, "_load", library.functools.cache(library._load.__wrapped__))


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources that compile in no time; returns their folder."""
    sources = tmp_path / "src"
    sources.mkdir()
    (sources / "ffi.cc").write_text('int half();\nextern "C" int answer() { return 2 * half(); }\n')
    (sources / "part.cc").write_text("int half() { return 21; }\n")
    monkeypatch.setattr(library, "SOURCES", sources)
    return sources


def test_it_is_there_with_a_compiler():
    loaded = library.load_library()
    assert loaded is not None
    assert loaded.panel_columns in (8, 16, 32)
    assert loaded.path.is_relative_to(library.cache_folder())
    assert library.require_library() is loaded


def test_the_cache_folder_follows_the_users(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert library.cache_folder() == Path("/somewhere/pshare_jax/native")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert library.cache_folder() == Path.home() / ".cache/pshare_jax/native"


def test_compiled_once_and_again_when_anything_changes(small, tmp_path, monkeypatch):
    first = library.build(tmp_path / "cache")
    made = first.stat().st_mtime_ns
    assert library.build(tmp_path / "cache") == first
    assert first.stat().st_mtime_ns == made
    left = sorted(path.name for path in first.parent.iterdir())
    assert left == [first.name, f"{first.name}.sha256"]

    monkeypatch.setattr(library, "_cpu", lambda: "another CPU")
    other_cpu = library.build(tmp_path / "cache")
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-g"))
    other_flags = library.build(tmp_path / "cache")
    (small / "more.h").write_text("// new")
    other_source = library.build(tmp_path / "cache")
    assert len({first, other_cpu, other_flags, other_source}) == 4


def test_a_damaged_library_is_made_again(small, tmp_path):
    path = library.build(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    again, loaded = library._open(tmp_path)
    assert again == path
    assert loaded.answer() == 42


LOADING = (
    "import sys, pathlib; from pshare_jax.kernels.native import library\n"
    "library.SOURCES = pathlib.Path(sys.argv[1])\n"
    "for folder in sys.argv[2:]: print(library._open(pathlib.Path(folder))[1].answer(), flush=True)"
)


def test_a_truncated_library_does_not_kill_the_process(small, tmp_path):
    """The system ends a process that reads a mapped file beyond its end (SIGBUS)."""
    paths = []
    for keep in (0.0, 0.3, 0.5, 0.9):
        path = library.build(tmp_path / f"keep {keep}")
        whole = path.read_bytes()
        path.write_bytes(whole[: int(keep * len(whole))])
        paths.append(path)
    folders = [str(tmp_path / path.relative_to(tmp_path).parts[0]) for path in paths]
    command = [sys.executable, "-c", LOADING, str(small), *folders]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, b"42\n" * len(paths)), done.stderr
    assert all(library._is_whole(path) for path in paths)


@pytest.mark.parametrize("damage", ["flipped", "no checksum", "another checksum"])
def test_a_library_that_differs_from_its_checksum_is_made_again(small, tmp_path, damage):
    path = library.build(tmp_path)
    checksum = path.with_name(f"{path.name}.sha256")
    whole, stated = path.read_bytes(), checksum.read_text()
    match damage:
        case "flipped":
            path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        case "no checksum":
            checksum.unlink()
        case _:
            checksum.write_text("0" * 64)
    made = path.stat().st_mtime_ns
    assert library._open(tmp_path)[1].answer() == 42
    assert path.stat().st_mtime_ns != made
    assert (path.read_bytes(), checksum.read_text()) == (whole, stated)


def test_two_processes_at_once(small, tmp_path):
    command = [sys.executable, "-c", LOADING, str(small), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) for _ in range(2)]
    assert [process.communicate(timeout=60)[0] for process in processes] == [b"42\n"] * 2
    assert len(list((tmp_path / "cache").rglob("*.so"))) == 1


def test_no_compiler_is_one_line_and_xla(anew, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.INFO, "pshare_jax"):
        assert backend_for("auto", "cpu") == "xla"
        assert backend_for("auto", "cpu") == "xla"
        with pytest.raises(ConfigError, match="cpu_ffi: its C"):
            library.require_library()
    (line,) = caplog.messages
    assert line.startswith("CPU kernels are not available, XLA takes their place: no C++ compiler")


def test_a_compiler_that_fails_is_one_line_and_xla(small, anew, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (small / "part.cc").write_text("#error something is missing\n")
    with caplog.at_level(logging.INFO, "pshare_jax"):
        assert library.load_library() is None
    (line,) = caplog.messages
    assert "something is missing" in line
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


TWO_CPUS = """#!/bin/sh
case "$*" in
  *=native*) ;;
  *=greater*) echo "#define __AVX512F__ 1"; echo "#define __AVX512FP16__ 1" ;;
  *=keys*)
    echo "#define __PKU__ 1"
    echo "#define __AVX512VP2INTERSECT__ 1"
    echo "#define __AMX_TILE__ 1" ;;
  *) echo "cc1plus: error: bad value for '-march='" >&2; exit 1 ;;
esac
echo "#define __AVX2__ 1"
"""


@pytest.mark.parametrize(
    ("march", "said"),
    [
        ("greater", "this CPU lacks AVX512F, AVX512FP16; name a lesser one, such as x86-64-v3"),
        ("unknown", "{} failed: cc1plus: error: bad value for '-march='"),
        ("keys", None),  # which no kernel uses unasked
    ],
)
def test_code_for_a_cpu_that_has_more_is_refused(anew, tmp_path, monkeypatch, march, said):
    script = tmp_path / "c++"
    script.write_text(TWO_CPUS)
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "MARCH", march)
    if said is None:
        assert library.load_library() is None  # since that compiler makes no library
    else:
        with pytest.raises(ConfigError, match=re.escape(said.format(script))) as refused:
            library.load_library()
        assert str(refused.value).startswith(f"PSHARE_MARCH={march}: ")


def test_a_real_compiler_says_what_it_uses():
    baseline = {"x86_64": "x86-64", "aarch64": "armv8-a"}[os.uname().machine]
    assert lacking(library._compiler(), baseline) == []
    assert used(library._compiler(), baseline)


COMPILER = """#!/bin/sh
case "$*" in
  *--version*) exit ;;
  *ffi.cc*) sleep 1000 & echo $! > "$HELD"; wait ;;
esac
while ! test -s "$HELD"; do sleep 0.01; done
test "$OUTCOME" = fails || sleep 1000
echo "part.cc: error: of its own" >&2
exit 1
"""


@pytest.mark.parametrize("outcome", ["fails", "interrupted", "takes too long"])
def test_no_compiler_and_no_file_is_left(small, tmp_path, monkeypatch, outcome):
    """A compiler's own children neither."""
    script, held = tmp_path / "c++", tmp_path / "held"
    script.write_text(COMPILER)
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("HELD", str(held))
    monkeypatch.setenv("OUTCOME", outcome)
    monkeypatch.setattr(compiling, "_cpus", lambda: 2)

    clock = SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda _: look())

    def look() -> None:
        time.sleep(0.01)
        if held.exists() and held.read_text():  # the compiler's child runs
            clock.monotonic = lambda: 1e6 if outcome == "takes too long" else 0.0
            if outcome == "interrupted":
                raise KeyboardInterrupt

    monkeypatch.setattr(compiling, "time", clock)
    raised, said = {
        "fails": (library.NativeBuildError, f"{script} failed: part.cc: error: of its own"),
        "interrupted": (KeyboardInterrupt, ""),
        "takes too long": (library.NativeBuildError, f"{script}: it takes longer than 600 seconds"),
    }[outcome]
    with pytest.raises(raised, match=f"^{re.escape(said)}$"):
        library.build(tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    deadline = time.monotonic() + 30
    while is_running(
        int(held.read_text())
    ):  # what has been killed ends at once, but not at this line
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_cache_that_cannot_be_written_is_one_line_and_a_temporary_folder(
    small, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path, loaded = library._open_somewhere()
    assert loaded.answer() == 42
    assert path.is_relative_to(tmp_path / f"pshare_jax-{os.geteuid()}" / "native")
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path}/file/pshare_jax/native: cannot be used (Not a directory)")


def test_no_folder_at_all_is_one_line_and_xla(small, anew, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(library.runtime_files, "private_folder", lambda: tmp_path / "file")
    assert library.load_library() is None
    (line,) = caplog.messages
    assert line.startswith("CPU kernels are not available, XLA takes their place: ")


@pytest.mark.parametrize(
    ("answer", "used", "line"),
    [
        (0, "vectors", None),
        (1, "amx", None),
        (2, "twin", None),
        (-1, "vectors", "PSHARE_AMX=0"),
        (-2, "vectors", "the operating system does not let this process use it"),
        (-3, "vectors", "its results differ from those that its manual gives"),
    ],
)
def test_the_matrix_unit_is_used_or_one_line_says_why_not(answer, used, line, monkeypatch, caplog):
    monkeypatch.delenv(library.AMX_VARIABLE, raising=False)
    asked = []

    class Started:
        def pshare_start_tiles(self, wanted: bool) -> int:
            asked.append(wanted)
            return answer

    with caplog.at_level(logging.INFO, "pshare_jax"):
        assert library._start_multiplier(Started()) == used  # pyright: ignore[reportArgumentType]
        monkeypatch.setenv(library.AMX_VARIABLE, "0")
        assert library._start_multiplier(Started()) == used  # pyright: ignore[reportArgumentType]
    assert asked == [True, False]
    if line is None:
        assert caplog.messages == []
    else:
        assert all(
            text.startswith(f"The CPU's matrix unit (AMX) is not used: {line}")
            for text in caplog.messages
        )
