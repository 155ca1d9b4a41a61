"""The real server over scripted answers, for real clients of frameworks.

The clients come with the extra `clients`. Nothing here reaches another host: tracing is off.
To import the frameworks takes seconds, and every process collects all tests: so those that run the
tests import them, and all of this folder runs in one process.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pshare_jax.text.tokenizer import Tokenizer
from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import Client, running_server
from tests.serve.test_completions import script
from tests.text.tiny import write_byte_level

# Knows tools, and says in which form calls are to be written.
TEMPLATE = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + (c.function | tojson) }}{% endfor %}"
    "{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
)
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ANSWER = "hello world"

Answers = Callable[..., None]
"""Called with the texts that the model is to answer with, one a request."""


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Iterator[Client]:
    tokenizer = Tokenizer.load(write_byte_level(tmp_path_factory.mktemp("clients"), TEMPLATE))
    with running_server(fake_engine(tokenizer, fake_config(max_model_len=16384))) as client:
        yield client


@pytest.fixture
def answers(served, monkeypatch) -> Answers:
    for name in ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2"):
        monkeypatch.setenv(name, "false")
    monkeypatch.setenv("OPENAI_AGENTS_DISABLE_TRACING", "1")
    return lambda *texts: script(served.engine, *texts)


@pytest.fixture
def base_url(served) -> str:
    return f"{served.url}/v1"


@pytest.fixture(scope="session")
def agents() -> Any:
    return importlib.import_module("agents")


@pytest.fixture(scope="session")
def pydantic_ai() -> Any:
    return importlib.import_module("pydantic_ai")


@pytest.fixture(scope="session")
def smolagents() -> Any:
    return importlib.import_module("smolagents")


@pytest.fixture(scope="session")
def city_weather(smolagents) -> Any:
    """A tool of smolagents."""

    tool = smolagents.tool  # which looks for its own name in the source

    @tool
    def get_weather(city: str) -> str:
        """The weather in a city.

        Args:
            city: its name.
        """
        return f"sunny in {city}"

    return get_weather


@pytest.fixture
def prompts(served) -> Callable[[], list[str]]:
    """The prompts that the model got since the test began."""
    before = len(served.engine.submitted)
    decode = served.engine.tokenizer.decode
    return lambda: [decode(r.prompt_token_ids) for r in served.engine.submitted[before:]]
