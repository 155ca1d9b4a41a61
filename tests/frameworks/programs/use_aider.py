"""Aider: a file is edited as the answer says."""

from __future__ import annotations

from told import FOLDER, URL, tell  # isort: skip

import os
import subprocess
import sys
from pathlib import Path

file = Path(FOLDER, "hello.py")
file.write_text("print('old')\n")
command = [
    sys.executable, "-m", "aider", "--model", "openai/planner", "--openai-api-base", URL,
    "--openai-api-key", "none", "--edit-format", "whole", "--no-git", "--yes-always",
    "--no-check-update", "--analytics-disable", "--no-show-model-warnings",
    "--no-show-release-notes", "--map-tokens", "0", "--no-detect-urls", "--no-pretty",
    "--message", "say new", "hello.py",
]  # fmt: skip
environment = os.environ | {"HOME": FOLDER}
done = subprocess.run(
    command, cwd=FOLDER, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
)
assert done.returncode == 0, done.stdout + done.stderr
tell(file=file.read_text())
