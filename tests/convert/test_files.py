"""Destinations that appear whole or not at all, lazy tensors, and the progress bar."""

from __future__ import annotations

import errno
import io
import os

import jax
import numpy as np
import pytest
from rich.console import Console

from pshare_jax.convert import files, progress
from pshare_jax.convert.files import atomic_folder, one_line, replace_file, replace_section
from pshare_jax.convert.progress import progress_bar
from pshare_jax.convert.tensors import DTYPES, LazyTensor, as_lazy
from pshare_jax.errors import CheckpointError, DataError


def test_the_folder_appears_at_the_end(tmp_path):
    dest = tmp_path / "parents" / "are" / "made"
    with atomic_folder(dest) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        assert folder.parent == dest.parent
        assert not dest.exists()
    assert (dest / "sub" / "file").read_text() == "x"
    assert list(dest.parent.iterdir()) == [dest]


def test_the_folder_has_the_rights_of_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "a"):
            pass
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_an_exception_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)), atomic_folder(tmp_path / "a") as folder:  # noqa: PT012
        (folder / "file").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_destination_that_appears_meanwhile_is_kept(tmp_path):
    with pytest.raises(CheckpointError, match="exists already"), atomic_folder(tmp_path / "a"):
        (tmp_path / "a").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(CheckpointError, match="file/a: cannot be created: "),
        atomic_folder(tmp_path / "file" / "a"),
    ):
        pass


def test_a_failing_flush_leaves_nothing(tmp_path, monkeypatch):
    """The disk may fill up as late as when data is flushed."""

    def fsync(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fsync)
    with (
        pytest.raises(CheckpointError, match="a: cannot be written: No space left on device"),
        atomic_folder(tmp_path / "a") as folder,
    ):
        (folder / "file").write_text("x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("\n  first \nsecond"), "first"),
        (ValueError(""), "ValueError"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError("x" * 1000), "x" * 400),
    ],
)
def test_errors_fit_on_a_line(error, expected):
    assert one_line(error) == expected


def test_lazy_tensors_convert_when_read():
    reads = []

    def read():
        reads.append(1)
        return np.arange(6, dtype=np.float32).reshape(2, 3)

    tensor = LazyTensor((2, 3), DTYPES["float32"], read)
    half = tensor.astype(DTYPES["bfloat16"])
    assert (tensor.nbytes, half.nbytes, reads) == (24, 12, [])
    assert half.read().dtype == DTYPES["bfloat16"]
    assert half.astype(DTYPES["bfloat16"]) is half
    device = as_lazy(jax.numpy.ones((2, 2)))
    assert (device.shape, device.dtype) == ((2, 2), np.float32)
    assert isinstance(device.read(), np.ndarray)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_shows_on_a_terminal_only(monkeypatch, terminal):
    screen = io.StringIO()
    monkeypatch.setattr(
        progress,
        "Console",
        lambda stderr: Console(file=screen, force_terminal=terminal, width=120),
    )
    with progress_bar("import x", 200) as report:
        report("layers.0.mlp.up.kernel", 50)
        report("layers.1.mlp.up.kernel", 150)
    shown = screen.getvalue()
    assert ("import x: layers.1.mlp.up.kernel" in shown) == terminal
    assert ("200/200 bytes" in shown) == terminal
    assert terminal or shown == ""


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.json"
    replace_file(path, "old")
    replace_file(path, "ä new one")
    assert path.read_text(encoding="utf-8") == "ä new one"

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        replace_file(path, "lost")
    assert path.read_text(encoding="utf-8") == "ä new one"
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_a_section_of_a_document_is_replaced(tmp_path):
    file = tmp_path / "doc.md"
    other = "<!-- b: begin -->\nkept\n<!-- b: end -->\n"
    file.write_text(f"before\n<!-- a: begin -->\nold\n<!-- a: end -->\n{other}")
    replace_section(file, "a", "new")
    assert file.read_text() == f"before\n<!-- a: begin -->\n\nnew\n<!-- a: end -->\n{other}"
    with pytest.raises(DataError, match="no lines <!-- c: begin -->"):
        replace_section(file, "c", "x")
    with pytest.raises(DataError, match="there is no document"):
        replace_section(tmp_path / "none.md", "a", "x")
