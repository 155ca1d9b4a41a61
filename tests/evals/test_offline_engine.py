"""The offline engine beside the server of the same engine: the same prompts, answers and scores."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from pshare_jax.engine.completion import Completion, ToolCall
from pshare_jax.engine.offline import Engine
from pshare_jax.errors import RequestError, UnknownModelError

QUESTION = [{"role": "user", "content": "hello there"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather now.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CONVERSATION = [
    *QUESTION,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"type": "function", "id": "1", "function": {"name": "weather", "arguments": "{}"}}
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "sunny"},
]


@pytest.fixture(scope="module")
def api(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("tools", [[], [WEATHER]], ids=["plain", "tools"])
def test_a_chat_is_the_servers(engine: Engine, api: openai.OpenAI, tools: list[Any]) -> None:
    answer = api.chat.completions.create(
        model="coder",
        messages=CONVERSATION,  # type: ignore[arg-type]
        max_tokens=12,
        temperature=0,
        extra_body={"return_token_ids": True, "tools": tools},
    )
    choice = answer.choices[0].model_dump()
    ours = engine.chat("coder", CONVERSATION, tools=tools, max_tokens=12)
    assert ours.token_ids == choice["token_ids"]
    assert ours.content == choice["message"]["content"]
    assert ours.usage.prompt_tokens == len(answer.model_dump()["prompt_token_ids"])
    assert str(ours.finish_reason) == choice["finish_reason"]


def test_calls_are_read_out_of_the_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    written = 'Well.<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    plain = engine.chat("coder", QUESTION, max_tokens=1)

    def generate(*_: Any, **__: Any) -> list[Completion]:
        return [Completion(written, plain.token_ids, plain.finish_reason, plain.usage)]

    monkeypatch.setattr(engine, "_generate", generate)
    answer = engine.chat("coder", QUESTION, tools=[WEATHER])
    assert answer.text == written
    assert answer.content == "Well."
    assert answer.tool_calls == [ToolCall("weather", '{"city": "Rome"}')]
    assert engine.chat("coder", QUESTION).tool_calls == []


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ([{"role": "pope", "content": "x"}], r"messages.*'pope'"),
        ([{"role": "user"}], "needs content"),
        ([{"content": "x"}], "missing required field 'role'"),
    ],
)
def test_messages_that_cannot_be_rendered(
    engine: Engine, messages: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        engine.chat("coder", messages)


def test_an_unknown_model(engine: Engine) -> None:
    with pytest.raises(UnknownModelError):
        engine.chat("nobody", QUESTION)


def test_scores_are_the_servers(engine: Engine, api: openai.OpenAI) -> None:
    text = "hello there, you"
    [ours] = engine.generate("coder", text, max_tokens=0, prompt_logprobs=1)
    echo = api.completions.create(
        model="coder", prompt=text, max_tokens=0, logprobs=1, echo=True, temperature=0
    )
    choice = echo.choices[0]
    assert choice.text == text
    assert choice.logprobs is not None
    first, *scores = ours.prompt_logprobs
    assert first is None
    assert choice.logprobs.token_logprobs == [
        None,
        *(pytest.approx(score.logprob, abs=1e-5) for score in scores if score is not None),
    ]
    assert ours.token_ids == []
    assert ours.text == ""
