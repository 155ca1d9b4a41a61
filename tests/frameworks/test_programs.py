"""Clients that agree with nobody on versions, each in an environment of its own.

`make test-clients` makes these and runs the tests. A program of `programs/` asks the real server,
over scripted answers, and tells what its client made of them.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import ANSWER, CALL, TEMPLATE, Answers
from tests.clients.test_structured import JSON, call
from tests.text.tiny import write_byte_level

pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent.parent / ".venv-clients"
ANNA = {"name": "Anna", "age": 41}
PARIS = ["get_weather", '{"city": "Paris"}']


@pytest.fixture
def run(base_url: str, tmp_path: Path) -> Any:
    """Runs a program in an environment; gives what it tells."""

    def run(environment: str, program: str) -> dict[str, Any]:
        python = ENVIRONMENTS / environment / "bin" / "python"
        assert python.exists(), f"{python} is missing: `make test-clients` makes it"
        done = subprocess.run(
            [python, HERE / "programs" / f"{program}.py", base_url, tmp_path],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(
            next(line for line in reversed(done.stdout.splitlines()) if line[:1] == "{")
        )

    return run


def test_litellm(run: Any, answers: Answers) -> None:
    answers(ANSWER, ANSWER, CALL, CALL, JSON, ANSWER, ANSWER, ANSWER)
    told = run("litellm", "use_litellm")
    assert told.pop("stream")[0] == ANSWER
    assert told == {
        "text": ANSWER,
        "auto": PARIS,
        "required": PARIS,
        "schema": ANNA,
        "completion": ANSWER,
        "responses": ANSWER,
        "messages": ANSWER,
    }


def test_dspy(run: Any, answers: Answers) -> None:
    answers(
        "[[ ## city ## ]]\nParis\n\n[[ ## count ## ]]\n3\n\n[[ ## completed ## ]]",
        '{"city": "Paris", "count": 3}',
        "[[ ## next_thought ## ]]\nI ask.\n\n[[ ## next_tool_name ## ]]\nget_weather\n\n"
        '[[ ## next_tool_args ## ]]\n{"city": "Paris"}\n\n[[ ## completed ## ]]',
        "[[ ## next_thought ## ]]\nDone.\n\n[[ ## next_tool_name ## ]]\nfinish\n\n"
        "[[ ## next_tool_args ## ]]\n{}\n\n[[ ## completed ## ]]",
        "[[ ## reasoning ## ]]\nIt said so.\n\n[[ ## answer ## ]]\nsunny\n\n[[ ## completed ## ]]",
    )
    assert run("litellm", "use_dspy") == {
        "ChatAdapter": ["Paris", 3],
        "JSONAdapter": ["Paris", 3],
        "agent": ["sunny", "sunny in Paris"],
    }


def test_autogen(run: Any, answers: Answers) -> None:
    answers(ANSWER, ANSWER, CALL, "It is sunny.", JSON)
    assert run("litellm", "use_autogen") == {
        "text": ANSWER,
        "stream": ANSWER,
        "tool": ["sunny in Paris", "It is sunny."],
        "typed": ANNA,
    }


def test_ag2(run: Any, answers: Answers, prompts: Any) -> None:
    answers(ANSWER, ANSWER, CALL, "It is sunny.", JSON)
    assert run("litellm", "use_ag2") == {
        "text": ANSWER,
        "stream": ANSWER,
        "tool": "It is sunny.",
        "typed": ANNA,
    }
    assert "[tool]sunny in Paris" in prompts()[3]


def test_llm(run: Any, answers: Answers) -> None:
    answers(ANSWER, ANSWER, JSON)
    assert run("litellm", "use_llm") == {"text": ANSWER, "stream": ANSWER, "schema": ANNA}


def test_instructor(run: Any, answers: Answers) -> None:
    answers(
        call("Person"), call("Person"), JSON, JSON, f"```json\n{JSON}\n```", call("Person"),
        call("Person"), JSON,
    )  # fmt: skip
    assert run("instructor", "use_instructor") == {
        "TOOLS": ANNA,
        "PARALLEL_TOOLS": [ANNA],
        "JSON": ANNA,
        "JSON_SCHEMA": ANNA,
        "MD_JSON": ANNA,
        "TOOLS_STRICT": ANNA,
        "RESPONSES_TOOLS": ANNA,
        "partial": ANNA,
    }


def test_llama_index(run: Any, answers: Answers) -> None:
    answers(ANSWER, ANSWER, ANSWER, CALL, call("Person"), JSON, ANSWER)
    assert run("llama_index", "use_llama_index") == {
        "text": ANSWER,
        "stream": ANSWER,
        "completion": ANSWER,
        "tool": "sunny in Paris",
        "by_tool": ANNA,
        "by_schema": ANNA,
        "responses": ANSWER,
    }


def test_crewai(run: Any, answers: Answers) -> None:
    answers(JSON, ANSWER, CALL, "It is sunny.")
    assert run("crewai", "use_crewai") == {"text": ANSWER, "typed": ANNA, "agent": "It is sunny."}


def test_aider(run: Any, answers: Answers) -> None:
    answers("hello.py\n```python\nprint('new')\n```")
    assert run("aider", "use_aider") == {"file": "print('new')\n"}


def test_lm_eval(run: Any, answers: Answers, tmp_path: Path) -> None:
    """The server's own tokenizer, whose ids are sent as prompts."""
    write_byte_level(tmp_path / "tokenizer", TEMPLATE)
    answers(ANSWER)
    told = run("evals", "use_lm_eval")
    assert (told["generated"], told["chat"]) == (1.0, 1.0)
    assert 0 <= told["chosen"] <= 1


def test_inspect(run: Any, answers: Answers) -> None:
    answers(CALL, "It is sunny.")
    assert run("evals", "use_inspect") == {
        "status": "success",
        "score": "C",
        "roles": ["user", "assistant", "tool", "assistant"],
    }
