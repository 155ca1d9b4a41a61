"""What clients of frameworks ask for when an answer has to have a form, or a tool has to be called.

Scripted answers: that grammars hold is for other tests. Here requests are taken, and what comes
back is what each client makes an object of.
"""

from __future__ import annotations

import openai
import pytest
from pydantic import BaseModel

from tests.clients.conftest import CALL


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int


ANNA = Person(name="Anna", age=41)
JSON = '{"name": "Anna", "age": 41}'
USER = [{"role": "user", "content": "who?"}]


def call(name: str, arguments: str = JSON) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@pytest.fixture
def api(base_url):
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as api:
        yield api


@pytest.fixture
async def async_api(base_url):
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as api:
        yield api


def test_openai_parses_chats(api, answers):
    answers(JSON)
    done = api.chat.completions.parse(model="planner", messages=USER, response_format=Person)
    assert done.choices[0].message.parsed == ANNA


def test_openai_parses_streamed_chats(api, answers):
    answers(JSON)
    with api.chat.completions.stream(
        model="planner", messages=USER, response_format=Person
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == ANNA


def test_openai_parses_responses(api, answers):
    answers(JSON)
    response = api.responses.parse(model="planner", input="who?", text_format=Person)
    assert response.output_parsed == ANNA


def test_openai_takes_any_json(api, answers):
    answers(JSON)
    done = api.chat.completions.create(
        model="planner", messages=USER, response_format={"type": "json_object"}
    )
    assert done.choices[0].message.content == JSON


@pytest.mark.parametrize(
    "choice",
    ["required", {"type": "function", "function": {"name": "f"}}],
    ids=["required", "named"],
)
def test_openai_forces_a_tool(api, answers, choice):
    answers(call("f", "{}"))
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    done = api.chat.completions.create(
        model="planner", messages=USER, tools=tools, tool_choice=choice
    )
    (called,) = done.choices[0].message.tool_calls
    assert (called.function.name, called.function.arguments) == ("f", "{}")


@pytest.mark.parametrize(
    ("method", "text"),
    [("json_schema", JSON), ("json_mode", JSON), ("function_calling", call("Person"))],
    ids=["json_schema", "json_mode", "function_calling"],
)
def test_langchain_with_structured_output(base_url, answers, method, text):
    from langchain_openai import ChatOpenAI

    answers(text)
    with openai.DefaultHttpxClient() as client:
        model = ChatOpenAI(
            model="planner", base_url=base_url, api_key="none", max_retries=0, http_client=client
        )
        assert model.with_structured_output(Person, method=method).invoke("who? JSON") == ANNA


@pytest.mark.parametrize("kind", ["OpenAIChatCompletionsModel", "OpenAIResponsesModel"])
async def test_openai_agents_output_type(agents, async_api, answers, kind):
    answers(JSON)
    model = getattr(agents, kind)(model="planner", openai_client=async_api)
    agent = agents.Agent("who", model=model, output_type=Person)
    assert (await agents.Runner.run(agent, "who?")).final_output == ANNA


@pytest.mark.parametrize("kind", ["OpenAIChatModel", "OpenAIResponsesModel"])
@pytest.mark.parametrize(
    ("output", "named", "text"),
    [
        ("NativeOutput", {}, JSON),
        ("PromptedOutput", {}, JSON),
        ("ToolOutput", {"name": "person"}, call("person")),
    ],
    ids=["native", "prompted", "tool"],
)
async def test_pydantic_ai_output_type(pydantic_ai, async_api, answers, kind, output, named, text):
    from pydantic_ai.models import openai as models
    from pydantic_ai.providers.openai import OpenAIProvider

    answers(text)
    model = getattr(models, kind)("planner", provider=OpenAIProvider(openai_client=async_api))
    output_type = getattr(pydantic_ai, output)(Person, **named)
    assert (await pydantic_ai.Agent(model, output_type=output_type).run("who?")).output == ANNA


def test_a_tool_calling_agent_of_smolagents(smolagents, base_url, answers, city_weather):
    """Every step of it forces a call."""
    answers(CALL, call("final_answer", '{"answer": "sunny"}'))
    with openai.DefaultHttpxClient() as client:
        model = smolagents.OpenAIServerModel(
            "planner", api_base=base_url, api_key="none", client_kwargs={"http_client": client}
        )
        agent = smolagents.ToolCallingAgent(
            tools=[city_weather], model=model, verbosity_level=0, max_steps=3
        )
        assert agent.run("weather?") == "sunny"
