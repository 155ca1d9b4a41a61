"""`pshare`: each command is that of `python -m`."""

from __future__ import annotations

import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pshare_jax
from pshare_jax import cli

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_help_names_every_command(argv, capsys):
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: pshare COMMAND")
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")] == [
        "serve",
        "worker",
        "train",
        "convert",
        "eval",
        "demo",
    ]


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"pshare {pshare_jax.__version__}\n"


def test_an_unknown_command_is_a_usage_error(capsys):
    assert cli.main(["server"]) == 2
    assert capsys.readouterr().err.startswith("pshare: there is no command 'server'\n")


@pytest.mark.parametrize("command", list(cli.COMMANDS))
@pytest.mark.parametrize(("code", "expected"), [(None, 0), (3, 3), ("words", 1)])
def test_a_command_is_its_module_run_as_main(command, code, expected, monkeypatch):
    ran = []

    def run_module(name, run_name, alter_sys):
        ran.append((name, run_name, alter_sys, sys.argv))
        raise SystemExit(code)

    monkeypatch.setattr(runpy, "run_module", run_module)
    monkeypatch.setattr(sys, "argv", ["x"])
    assert cli.main([command, "--a", "b"]) == expected
    module = cli.COMMANDS[command][0]
    assert ran == [(module, "__main__", True, [f"pshare {command}", "--a", "b"])]
    path = Path(ROOT, *module.split("."))
    assert (path / "__main__.py").is_file() or path.with_suffix(".py").is_file()


def test_exit_code_and_message_are_the_commands_own(tmp_path):
    def run(*command: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", *command, "compare", "nowhere", "nowhere"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        return done.returncode, done.stderr

    plain = run("pshare_jax.evals")
    assert plain[0] == 2
    assert plain[1].startswith("pshare_jax.evals: nowhere: cannot be read")
    assert run("pshare_jax.cli", "eval") == plain


def test_the_demo_says_that_it_needs_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert runpy.run_module("pshare_jax.demo.__main__")["main"]() == 2
    assert "the demo runs in a checkout of pshare_jax" in capsys.readouterr().out


def test_the_script_and_the_version_are_declared_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"pshare": "pshare_jax.cli:main"}
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "pshare_jax/__init__.py"
