"""Structured output by the offline engine, and by the server in front of that very engine."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pytest

from pshare_jax.core.requests import FinishReason
from pshare_jax.engine.offline import Engine
from pshare_jax.errors import RequestError

QUESTION: list[Any] = [{"role": "user", "content": "hello there"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "day": {"enum": ["mon", "tue"]}},
    "required": ["city", "day"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]


@pytest.fixture(scope="module")
def api(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_is_the_servers_and_follows(
    engine: Engine, api: openai.OpenAI, temperature: float
) -> None:
    ours = engine.chat(
        "coder", QUESTION, response_format=FORMAT, temperature=temperature, seed=3, max_tokens=150
    )
    fields: dict[str, Any] = {
        "model": "coder",
        "messages": QUESTION,
        "response_format": FORMAT,
        "temperature": temperature,
        "seed": 3,
        "max_tokens": 150,
    }
    choice = api.chat.completions.create(**fields).choices[0]
    assert ours.finish_reason is FinishReason.STOP
    assert (choice.finish_reason, choice.message.content) == ("stop", ours.content)
    jsonschema.validate(json.loads(ours.content), SCHEMA)
    streamed = [
        chunk.choices[0].delta.content or ""
        for chunk in api.chat.completions.create(**fields, stream=True)
    ]
    assert "".join(streamed) == ours.content


def test_a_forced_call(engine: Engine) -> None:
    answer = engine.chat(
        "coder", QUESTION, tools=TOOLS, tool_choice="required", parallel_tool_calls=False
    )
    [call] = answer.tool_calls
    assert call.name == "weather"
    jsonschema.validate(json.loads(call.arguments), SCHEMA)


def test_completions(engine: Engine) -> None:
    fields = {"choice": ["good", "bad"]}
    [one] = engine.generate("base", "hello", structured_outputs=fields)
    assert one.text in fields["choice"]
    [free] = engine.generate("base", "hello", max_tokens=8)
    word = engine.orchestrator.tokenizer.decode(free.token_ids[:1])
    [other] = engine.generate("base", "hello", max_tokens=8, bad_words=[word])
    assert free.token_ids[0] not in other.token_ids


def test_what_is_refused(engine: Engine) -> None:
    for fields, param in (
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json": {"not": {}}}}, "grammar"),
    ):
        with pytest.raises(RequestError) as caught:
            engine.generate("base", "hello", **fields)  # type: ignore[arg-type]
        assert caught.value.param == param
    with pytest.raises(RequestError, match="needs tools"):
        engine.chat("coder", QUESTION, tool_choice="required")
