"""Inspect AI: a task of one sample, with a tool, by its provider for such servers."""

from __future__ import annotations

from told import FOLDER, URL, tell  # isort: skip

import os

os.environ.update(LOCAL_BASE_URL=URL, LOCAL_API_KEY="none", INSPECT_DISPLAY="none")

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import Tool, tool


@tool
def get_weather() -> Tool:
    """The weather."""

    async def execute(city: str) -> str:
        """The weather in a city.

        Args:
            city: its name.
        """
        return f"sunny in {city}"

    return execute


task = Task(
    dataset=[Sample(input="weather?", target="sunny")],
    solver=[use_tools(get_weather()), generate()],
    scorer=includes(),
)
[log] = eval(task, model="openai-api/local/planner", log_dir=FOLDER, max_retries=0)
[sample] = log.samples
tell(
    status=log.status,
    score=sample.scores["includes"].value,
    roles=[message.role for message in sample.messages],
)
