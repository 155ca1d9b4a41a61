"""langchain-openai and LangGraph's agents: text, batches, streams and tools."""

from __future__ import annotations

import openai
import pytest

from tests.clients.conftest import ANSWER, CALL


@pytest.fixture(scope="module")
def get_weather():
    from langchain_core.tools import tool

    @tool
    def get_weather(city: str) -> str:
        """The weather in a city."""
        return f"sunny in {city}"

    return get_weather


@pytest.fixture(params=[False, True], ids=["chat", "responses"])
async def model(request, base_url):
    from langchain_openai import ChatOpenAI

    with openai.DefaultHttpxClient() as client:
        async with openai.DefaultAsyncHttpxClient() as async_client:
            yield ChatOpenAI(
                model="planner",
                base_url=base_url,
                api_key="none",
                max_retries=0,
                use_responses_api=request.param,
                http_client=client,
                http_async_client=async_client,
            )


def test_text(model, answers, prompts):
    answers(ANSWER)
    message = model.invoke([("system", "Be kind."), ("user", "hi")])
    assert message.text == ANSWER
    assert message.usage_metadata["output_tokens"] > 0
    assert prompts() == ["[system]Be kind.[user]hi"]


async def test_batches_of_an_async_client(model, answers):
    answers(ANSWER)
    messages = await model.abatch(["a", "b", "c"])
    assert [message.text for message in messages] == [ANSWER] * 3


def test_stream(model, answers):
    answers(ANSWER)
    texts = [chunk.text for chunk in model.stream("hi")]
    assert "".join(texts) == ANSWER


def test_a_tool_call(model, answers, get_weather):
    answers(CALL)
    message = model.bind_tools([get_weather]).invoke("weather?")
    (call,) = message.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})


def test_a_streamed_tool_call(model, answers, get_weather):
    answers(CALL)
    whole = None
    for chunk in model.bind_tools([get_weather]).stream("weather?"):
        whole = chunk if whole is None else whole + chunk
    (call,) = whole.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})


def test_an_agent_of_langgraph(model, answers, prompts, get_weather):
    from langchain.agents import create_agent

    answers(CALL, "It is sunny.")
    agent = create_agent(model, tools=[get_weather], system_prompt="You forecast.")
    messages = agent.invoke({"messages": [("user", "weather?")]})["messages"]
    assert [message.type for message in messages] == ["human", "ai", "tool", "ai"]
    assert messages[-1].text == "It is sunny."
    assert "[tool]sunny in Paris" in prompts()[1]
