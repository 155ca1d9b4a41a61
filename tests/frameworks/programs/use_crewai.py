"""CrewAI: a model called directly, with a schema, and an agent with a tool."""

from __future__ import annotations

from told import FOLDER, URL, tell  # isort: skip

import os

os.environ["CREWAI_STORAGE_DIR"] = FOLDER
os.environ["OPENAI_API_KEY"] = "none"

from crewai import LLM, Agent
from crewai.tools import tool
from pydantic import BaseModel


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int


@tool("get_weather")
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


llm = LLM(model="openai/planner", base_url=URL, api_key="none", max_retries=0)
typed = LLM(
    model="openai/planner", base_url=URL, api_key="none", max_retries=0, response_format=Person
)
person = typed.call("who?")
if isinstance(person, str):
    person = Person.model_validate_json(person)
agent = Agent(
    role="forecaster", goal="forecast", backstory="knows", llm=llm, tools=[get_weather], max_iter=3
)
tell(text=llm.call("hi"), typed=person.model_dump(), agent=agent.kickoff("weather?").raw)
