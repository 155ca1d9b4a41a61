"""Compiling the C++ kernels: once, whole, for this CPU; and doing without them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pshare_jax.errors import ConfigError
from pshare_jax.kernels.backends import backend_for
from pshare_jax.kernels.native import library

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
    (sources / "ffi.cc").write_text('extern "C" int answer() { return 42; }\n')
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
    (small / "ffi.cc").write_text("#error something is missing\n")
    with caplog.at_level(logging.INFO, "pshare_jax"):
        assert library.load_library() is None
    (line,) = caplog.messages
    assert "something is missing" in line
    assert not list((tmp_path / "cache").rglob("*.so"))


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


TWIN = """
import sys
from pshare_jax.kernels.native import library
library.FLAGS = tuple("-O1" if f == "-O3" else f for f in library.FLAGS)
library.FLAGS += ("-DPSHARE_TILES_TWIN",)
loaded = library.require_library()
assert (loaded.panel_columns, loaded.multiplier) == (32, "twin"), loaded
import pytest
layers = "(same_numbers or unlike_shape or rows_of_the_base) and (panel or odd or gpt or gemma2)"
of_packed = "beside_it or best_token or tied_head"
names = f"({layers} or {of_packed} or cpu_ffi or cpp or bits or test_bfloat16)"
names += " and not float32 and not dynamic"
files = ["tests/models/test_packed.py", "tests/models/test_packed_eight_bits.py"]
files += ["tests/kernels/test_matmul.py", "tests/kernels/test_paged_attention.py"]
files += ["tests/engine/test_cpu_backend.py"]
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *files, "-k", names]))
"""


AVX2 = """
import os, sys
from pshare_jax.kernels.native import library
library.FLAGS = tuple("-O1" if f == "-O3" else f for f in library.FLAGS if f != "-march=native")
library.FLAGS += ("-march=x86-64-v3",)
loaded = library.require_library()
assert loaded.panel_columns == 16, loaded
import pytest
names = "test_same_numbers and (qwen2 or odd) or unlike_shape and odd or beside_it"
names += " or test_numbers and cpu_ffi and 160"
files = ["tests/models/test_packed.py", "tests/models/test_packed_eight_bits.py"]
files += ["tests/kernels/test_matmul.py"]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *files, "-k", names]))
"""


def run_in_another_process(script: str, cache: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the flags are those of x86-64")
def test_the_code_for_cpus_without_avx512(tmp_path):
    run_in_another_process(AVX2, tmp_path)


@pytest.mark.slow
def test_the_code_for_cpus_with_a_matrix_unit(tmp_path):
    """All of it but the instructions themselves, which test_tiles.py runs: with the unit's twin."""
    run_in_another_process(TWIN, tmp_path)
