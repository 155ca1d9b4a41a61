"""Set-up of the whole run: platform, virtual devices and a compilation cache, before JAX starts."""

import gc
import os
import sys
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from tests.xla_flags import USERS, set_quick

# Tests compile hundreds of programs and run each for milliseconds: before jax is imported, and for
# the processes that tests start. What one has compiled no other one compiles again.
if not USERS:
    set_quick()
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".cache/xla-tests")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest
from xdist.scheduler import LoadFileScheduling

from pshare_jax.kernels.native.library import load_library
from pshare_jax.runtime.host_memory import return_freed_memory
from tests.helpers import optimisations, set_optimisations
from tests.lowering import share_contexts


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--platform",
        choices=("cpu", "tpu", "cuda"),
        default="cpu",
        help="where JAX runs; tests marked `tpu` and `gpu` need theirs",
    )


TOGETHER = {
    "clusters": ("tests/e2e/test_cluster", "tests/e2e/test_gang"),
    "clients": ("tests/clients/",),
}
"""Files that go to one process: two clusters at a time would only wait for each other, and clients
are large to import."""


class ByFile(LoadFileScheduling):
    """Each file goes to one process."""

    def _split_scope(self, nodeid: str) -> str:
        for scope, files in TOGETHER.items():
            if nodeid.startswith(files):
                return scope
        return super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile | None:
    return ByFile(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_sessionstart(session: pytest.Session) -> None:
    """C++ is compiled while tests are collected, not when all processes wait for it."""
    if session.config.getoption("numprocesses", None):
        threading.Thread(target=load_library).start()


def pytest_collection_finish() -> None:
    """What was imported stays: garbage collections need not walk it again and again.

    And they come seldom: tracing makes many small objects that stay, and JAX does work of its own
    after each collection.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def _unflushed() -> Iterator[None]:
    """This process does not wait for its disk: what only a power cut could tell, no test can."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, None, None]:
    """What the tests of one folder have compiled takes no memory from the next one's."""
    yield
    if nextitem is not None and nextitem.path.parent != item.path.parent:
        jax.clear_caches()
        return_freed_memory()


def pytest_configure(config: pytest.Config) -> None:
    platform = config.getoption("--platform")
    jax.config.update("jax_platforms", platform)
    # To keep the small programs of this process, which few have again, takes as long as to compile
    # them; processes that tests start have the same ones each time.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    if platform == "cpu":
        # Most programs run for milliseconds and compile for seconds.
        set_optimisations(False)


@pytest.fixture(scope="module")
def optimised() -> Iterator[None]:
    """XLA optimises: for what it makes of a program, or what computes for long.

    The flags of `tests/xla_flags.py` hold all the same, as they do for the whole process.
    """
    with optimisations():
        yield


if not USERS:
    share_contexts()
jax.config.update("jax_num_cpu_devices", 8)
# Hundreds of processes import the same modules: none compiles them again, whatever the shell says.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
