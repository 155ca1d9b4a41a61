"""AG2: an agent's text whole and streamed, a tool, and a typed answer."""

from __future__ import annotations

from told import URL, tell  # isort: skip

import asyncio

from ag2 import Agent, tool
from ag2.config.openai import OpenAIConfig
from pydantic import BaseModel


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int


@tool
async def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def config(**options: object) -> OpenAIConfig:
    """The server's model."""
    return OpenAIConfig("planner", api_key="none", base_url=URL, max_retries=0, **options)


async def main() -> None:
    """All of it."""
    agent = Agent("a", config=config())
    text = await agent.ask("hi")
    streamed = await Agent("a", config=config(streaming=True)).ask("hi")
    used = await agent.ask("weather?", tools=[get_weather])
    typed = await agent.ask("who?", response_schema=Person)
    person = await typed.content()
    tell(text=text.body, stream=streamed.body, tool=used.body, typed=person.model_dump())


asyncio.run(main())
