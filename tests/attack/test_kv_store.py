"""Processes of one pool are killed at every step of the protocol: no wrong read, nothing leaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = float(os.environ.get("CHAOS_SECONDS", "3"))
"""How long processes are killed at random; `make chaos` takes ten minutes."""


@pytest.mark.timeout(SECONDS + 300)
def test_members_that_are_killed_at_every_step(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.attack.kv_store_hammer", str(tmp_path), str(SECONDS), "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS + 240,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    print(result)
    assert result["wrong"] == 0
    assert result["lost"] == 0
    assert result["lines"] > 200, "the scenario is that long"
    assert result["kills"] >= 4
    assert result["reads"] > 0
    assert result["rebuilt"] > 10, "some died while they held the lock"
    assert result["buried"] > 10, "some died with pins or half-written slots"
