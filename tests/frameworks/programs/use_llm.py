"""The command `llm`: text whole and streamed, and an answer by a schema."""

from __future__ import annotations

from told import FOLDER, URL, tell  # isort: skip

import json
import os
import subprocess
import sys
from pathlib import Path

MODEL = f"""
- model_id: local
  model_name: planner
  api_base: {URL}
  supports_schema: true
  supports_tools: true
"""


def llm(*arguments: str) -> str:
    """What the command prints."""
    command = [sys.executable, "-m", "llm", "-m", "local", "--key", "none", "hi", *arguments]
    environment = os.environ | {"LLM_USER_PATH": FOLDER}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


Path(FOLDER, "extra-openai-models.yaml").write_text(MODEL)
tell(
    text=llm("--no-stream"),
    stream=llm(),
    schema=json.loads(llm("--schema", "name, age int")),
)
