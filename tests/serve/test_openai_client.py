"""The real client of the API that this server speaks."""

import openai
import pytest

from pshare_jax.errors import QueueFullError
from tests.serve.server import eventually
from tests.serve.test_completions import script

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
def api(client):
    with openai.OpenAI(base_url=f"{client.url}/v1", api_key="none", max_retries=0) as api:
        yield api


def test_completions(client, api):
    answer = api.completions.create(model="planner", prompt="hello", logprobs=2, n=2)
    assert [choice.text for choice in answer.choices] == ["hello world"] * 2
    assert answer.choices[0].finish_reason == "stop"
    assert "".join(answer.choices[0].logprobs.tokens) == "hello world"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id == answer.id


def test_completions_as_a_stream(client, api):
    chunks = list(
        api.completions.create(
            model="planner", prompt="hello", stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == "hello world"
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 0


def test_chat(client, api):
    answer = api.chat.completions.create(
        model="planner",
        messages=MESSAGES,
        logprobs=True,
        top_logprobs=3,
        extra_body={"top_k": 3, "min_p": 0.1, "cache_salt": "me"},
    )
    message = answer.choices[0].message
    assert (message.role, message.content, message.tool_calls) == ("assistant", "hello world", None)
    content = answer.choices[0].logprobs.content
    assert "".join(token.token for token in content) == "hello world"
    assert [len(token.top_logprobs) for token in content] == [3] * len(content)
    assert client.engine.submitted[0].params.top_k == 3
    # The answer can be sent back as it is.
    again = api.chat.completions.create(
        model="coder", messages=[*MESSAGES, message.model_dump(), *MESSAGES]
    )
    assert again.usage.prompt_tokens_details.shared_tokens == 0


def test_chat_as_a_stream(client, api):
    script(client.engine, "naïve café 你好 🙂")
    with api.chat.completions.stream(
        model="planner", messages=MESSAGES, stream_options={"include_usage": True}
    ) as stream:
        completion = stream.get_final_completion()
    assert completion.choices[0].message.content == "naïve café 你好 🙂"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.completion_tokens > 3


async def test_the_asynchronous_client(client):
    async with openai.AsyncOpenAI(
        base_url=f"{client.url}/v1", api_key="none", max_retries=0
    ) as api:
        stream = await api.chat.completions.create(model="coder", messages=MESSAGES, stream=True)
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
    assert text == "hello world"


def test_models(client, api):
    models = {model.id: model for model in api.models.list()}
    assert set(models) == {"planner", "coder", "team/critic"}
    assert models["planner"].parent == "base"
    assert models["planner"].sharing == "shared"
    assert api.models.retrieve("team/critic").sharing == "isolated"
    assert api.models.retrieve("coder").created == 1_700_000_000


def test_errors_are_the_clients_typed_exceptions(client, api):
    with pytest.raises(openai.NotFoundError) as caught:
        api.completions.create(model="nobody", prompt="x")
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("nobody")
    with pytest.raises(openai.BadRequestError) as caught:
        api.chat.completions.create(model="planner", messages=MESSAGES, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        api.chat.completions.create(model="planner", messages=MESSAGES, max_tokens=1000)
    assert caught.value.code == "context_length_exceeded"
    client.engine.submit_error = QueueFullError("256 requests wait", retry_after=2.2)
    with pytest.raises(openai.RateLimitError) as caught:
        api.completions.create(model="planner", prompt="x")
    assert caught.value.response.headers["Retry-After"] == "3"
    client.engine.submit_error = None
    client.engine.fail("no memory")
    with pytest.raises(openai.InternalServerError) as caught:
        api.completions.create(model="planner", prompt="x")
    assert caught.value.status_code == 503
    assert "no memory" in str(caught.value)


def test_an_error_in_a_stream_is_an_exception_too(client, api):
    client.engine.gate.clear()
    stream = api.completions.create(model="planner", prompt="x", stream=True)
    client.engine.fail("no memory")
    with pytest.raises(openai.APIError, match="no memory"):
        list(stream)


def test_a_client_that_stops_reading_gives_its_sequence_back(client, api):
    script(client.engine, "x", end=False)
    client.engine.gate.clear()
    stream = api.chat.completions.create(model="planner", messages=MESSAGES, stream=True)
    assert len(client.engine.running_ids) == 1
    stream.close()
    eventually(lambda: client.engine.running_ids == [])
    assert client.engine.aborted == [client.engine.submitted[0].id]
