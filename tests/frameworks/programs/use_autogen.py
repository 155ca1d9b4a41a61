"""AutoGen: an assistant's text, stream, tool and typed answer."""

from __future__ import annotations

from told import URL, tell  # isort: skip

import asyncio

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.messages import ModelClientStreamingChunkEvent, StructuredMessage
from autogen_ext.models.openai import OpenAIChatCompletionClient
from pydantic import BaseModel


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int


async def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


async def main() -> None:
    """All of it."""
    client = OpenAIChatCompletionClient(
        model="planner",
        base_url=URL,
        api_key="none",
        max_retries=0,
        model_info={
            "vision": False,
            "function_calling": True,
            "json_output": True,
            "structured_output": True,
            "family": "unknown",
            "multiple_system_messages": True,
        },
    )
    text = await AssistantAgent("a", client).run(task="hi")
    streaming = AssistantAgent("a", client, model_client_stream=True)
    pieces = [
        event.content
        async for event in streaming.run_stream(task="hi")
        if isinstance(event, ModelClientStreamingChunkEvent)
    ]
    using = AssistantAgent("a", client, tools=[get_weather], reflect_on_tool_use=True)
    used = await using.run(task="weather?")
    typed = await AssistantAgent("a", client, output_content_type=Person).run(task="who?")
    person = typed.messages[-1]
    assert isinstance(person, StructuredMessage)
    tell(
        text=text.messages[-1].content,
        stream="".join(pieces),
        tool=[used.messages[2].content[0].content, used.messages[-1].content],
        typed=person.content.model_dump(),
    )
    await client.close()


asyncio.run(main())
