"""A server in a process of its own ends with whoever has started it, however that ends."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

from tests.serve.server import eventually

ROOT = Path(__file__).parents[2]

# Holds a lock for as long as it runs.
SERVER = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("pshare_jax: ready at http://there", flush=True)
time.sleep(100)
"""

HOLDER = """
import sys, time
from pshare_jax.serve.process import running_server

with running_server([], program=(sys.executable, "-c", *sys.argv[1:])) as url:
    print(url, flush=True)
    time.sleep(600)
"""


def test_a_server_ends_with_who_has_started_it(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    command = [sys.executable, "-c", HOLDER, SERVER, str(lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "http://there\n"
        finally:
            holder.kill()
    with lock.open() as file:

        def is_free() -> bool:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        eventually(is_free)
