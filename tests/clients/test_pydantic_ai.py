"""pydantic-ai: text, streams and tools, over chat completions, Responses and Messages."""

from __future__ import annotations

import openai
import pytest

from tests.clients.conftest import ANSWER, CALL


@pytest.fixture(params=["chat", "responses", "messages"])
async def model(request, base_url):
    if request.param == "messages":
        import anthropic
        from pydantic_ai.models.anthropic import AnthropicModel
        from pydantic_ai.providers.anthropic import AnthropicProvider

        url = base_url.removesuffix("/v1")
        async with anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as api:
            yield AnthropicModel("planner", provider=AnthropicProvider(anthropic_client=api))
    else:
        from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
        from pydantic_ai.providers.openai import OpenAIProvider

        kind = OpenAIChatModel if request.param == "chat" else OpenAIResponsesModel
        async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as api:
            yield kind("planner", provider=OpenAIProvider(openai_client=api))


async def test_text(pydantic_ai, model, answers, prompts):
    answers(ANSWER)
    result = await pydantic_ai.Agent(model, instructions="Be kind.").run("hi")
    assert result.output == ANSWER
    assert result.usage.output_tokens > 0
    assert prompts() == ["[system]Be kind.[user]hi"]


async def test_stream(pydantic_ai, model, answers):
    answers(ANSWER)
    async with pydantic_ai.Agent(model).run_stream("hi") as result:
        deltas = [delta async for delta in result.stream_text(delta=True, debounce_by=None)]
    assert "".join(deltas) == ANSWER


async def test_a_tool_is_called_and_its_result_read(pydantic_ai, model, answers, prompts):
    answers(CALL, "It is sunny.")
    agent = pydantic_ai.Agent(model)

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """The weather in a city."""
        return f"sunny in {city}"

    result = await agent.run("weather?")
    assert result.output == "It is sunny."
    first, second = prompts()
    assert '"get_weather"' in first
    assert "sunny in Paris" in second
