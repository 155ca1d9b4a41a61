"""smolagents: text, streams, and its two kinds of agents."""

from __future__ import annotations

import openai
import pytest

from tests.clients.conftest import ANSWER

USER = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]


@pytest.fixture
def model(base_url, smolagents):
    with openai.DefaultHttpxClient() as client:
        yield smolagents.OpenAIServerModel(
            "planner", api_base=base_url, api_key="none", client_kwargs={"http_client": client}
        )


def test_text(model, answers):
    answers(ANSWER)
    message = model.generate(USER)
    assert message.content == ANSWER
    assert message.token_usage.output_tokens > 0


def test_stream(model, answers):
    answers(ANSWER)
    deltas = [delta.content for delta in model.generate_stream(USER) if delta.content]
    assert "".join(deltas) == ANSWER


def test_an_agent_that_writes_code(smolagents, model, answers, prompts, city_weather):
    answers('<code>\nfinal_answer(get_weather(city="Paris"))\n</code>')
    agent = smolagents.CodeAgent(tools=[city_weather], model=model, verbosity_level=0, max_steps=2)
    assert agent.run("weather?") == "sunny in Paris"
    assert "weather?" in prompts()[0]
