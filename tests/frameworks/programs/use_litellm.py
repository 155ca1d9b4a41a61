"""LiteLLM: chats, streams, tools, schemas, completions, Responses and Messages."""

from __future__ import annotations

from told import URL, USER, WEATHER, tell  # isort: skip

import asyncio

import litellm
from pydantic import BaseModel


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int


KEYS = {"api_key": "none", "max_retries": 0}
CHAT = {"model": "openai/planner", "api_base": URL, **KEYS}


def streamed() -> tuple[str, int]:
    """The text of a stream, and its count of tokens."""
    text, tokens = "", 0
    options = {"stream": True, "stream_options": {"include_usage": True}}
    for chunk in litellm.completion(messages=USER, **options, **CHAT):
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = getattr(chunk, "usage", None)
        tokens = usage.completion_tokens if usage else tokens
    return text, tokens


def called(**options: object) -> list[str]:
    """The call that an answer holds."""
    message = (
        litellm.completion(messages=USER, tools=[WEATHER], **options, **CHAT).choices[0].message
    )
    [call] = message.tool_calls
    return [call.function.name, call.function.arguments]


async def messages() -> str:
    """An answer by Anthropic's API."""
    answer = await litellm.anthropic.messages.acreate(
        model="anthropic/planner",
        messages=USER,
        max_tokens=50,
        api_base=URL.removesuffix("/v1"),
        api_key="none",
    )
    return answer["content"][0]["text"]


tell(
    text=litellm.completion(messages=USER, **CHAT).choices[0].message.content,
    stream=streamed(),
    auto=called(),
    required=called(tool_choice="required"),
    schema=Person.model_validate_json(
        litellm.completion(messages=USER, response_format=Person, **CHAT).choices[0].message.content
    ).model_dump(),
    completion=litellm.text_completion(
        model="text-completion-openai/planner", prompt="hi", api_base=URL, **KEYS
    )
    .choices[0]
    .text,
    responses=litellm.responses(
        model="openai/planner", input="hi", api_base=URL, api_key="none"
    ).output_text,
    messages=asyncio.run(messages()),
)
