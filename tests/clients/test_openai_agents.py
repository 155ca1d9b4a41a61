"""openai-agents: text, streams and tools, over chat completions and over Responses."""

from __future__ import annotations

import openai
import pytest

from tests.clients.conftest import ANSWER, CALL


@pytest.fixture(params=["OpenAIChatCompletionsModel", "OpenAIResponsesModel"])
async def model(request, agents, base_url):
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        yield getattr(agents, request.param)(model="planner", openai_client=client)


async def test_text(agents, model, answers, prompts):
    answers(ANSWER)
    agent = agents.Agent("greeter", instructions="Be kind.", model=model)
    result = await agents.Runner.run(agent, "hi")
    assert result.final_output == ANSWER
    assert prompts() == ["[system]Be kind.[user]hi"]
    usage = result.context_wrapper.usage
    assert usage.input_tokens > 0
    assert usage.output_tokens > 0


async def test_stream(agents, model, answers):
    answers(ANSWER)
    stream = agents.Runner.run_streamed(agents.Agent("greeter", model=model), "hi")
    deltas = [
        event.data.delta
        async for event in stream.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    assert "".join(deltas) == stream.final_output == ANSWER


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_tool_is_called_and_its_result_read(agents, model, answers, prompts, streamed):
    @agents.function_tool
    def get_weather(city: str) -> str:
        """The weather in a city."""
        return f"sunny in {city}"

    answers(CALL, "It is sunny.")
    agent = agents.Agent("forecaster", model=model, tools=[get_weather])
    if streamed:
        result = agents.Runner.run_streamed(agent, "weather?")
        async for _ in result.stream_events():
            pass
    else:
        result = await agents.Runner.run(agent, "weather?")
    assert result.final_output == "It is sunny."
    first, second = prompts()
    assert '"get_weather"' in first
    assert "[tool]sunny in Paris" in second


async def test_agents_hand_over(agents, model, answers, prompts):
    answers(
        '<tool_call>\n{"name": "transfer_to_critic", "arguments": {}}\n</tool_call>', "All good."
    )
    critic = agents.Agent("critic", instructions="Criticise.", model=model)
    planner = agents.Agent("planner", instructions="Plan.", model=model, handoffs=[critic])
    result = await agents.Runner.run(planner, "plan a trip")
    assert (result.final_output, result.last_agent.name) == ("All good.", "critic")
    assert prompts()[1].startswith("[system]Criticise.")
