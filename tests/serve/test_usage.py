from hypothesis import given
from hypothesis import strategies as st

from pshare_jax.core.requests import PromptUsage, RequestOutput
from pshare_jax.frontend.output import SequenceOutput
from pshare_jax.frontend.params import OutputParams
from pshare_jax.serve.usage import total_usage
from tests.serve.fake import MODELS, fake_config, fake_engine
from tests.serve.server import running_server

PLAIN = OutputParams(1, False, False, (), False, True, None)


def details(answer) -> tuple[int, int, int]:
    usage = answer.json["usage"]
    nested = usage["prompt_tokens_details"]
    return usage["prompt_tokens"], nested["cached_tokens"], nested["shared_tokens"]


def test_rule_9_honest_usage(client):
    """Cached tokens never exceed the prompt's; shared ones are those of another model."""
    prompt = list(range(3, 25))  # 22 tokens: 5 whole pages of 4 before the tail
    assert details(client.complete(prompt)) == (22, 0, 0)
    assert details(client.complete(prompt)) == (22, 20, 0)
    assert details(client.complete(prompt, model="coder")) == (22, 20, 20)
    # A model that prefills for itself shares with nobody.
    assert details(client.complete(prompt, model="team/critic")) == (22, 0, 0)
    assert details(client.complete(prompt, model="team/critic")) == (22, 20, 0)
    # Another tenant's cache is no cache.
    assert details(client.complete(prompt, cache_salt="other")) == (22, 0, 0)
    for model in MODELS:
        for length in range(1, 23):
            counted, cached, shared = details(client.complete(prompt[:length], model=model))
            assert counted == length
            assert 0 <= shared <= cached < counted


def test_each_prompt_counts_once_however_many_samples_it_has(client):
    prompt = list(range(3, 25))
    # What the second sample found was computed for the first: that is no cache hit.
    assert details(client.complete(prompt, n=3)) == (22, 0, 0)
    assert details(client.complete(prompt, n=3)) == (22, 20, 0)
    assert details(client.complete([prompt, [7, 8]], n=2, model="coder")) == (24, 20, 20)
    assert client.complete(prompt, n=3, max_tokens=2).json["usage"]["completion_tokens"] == 6


@given(
    prompt_len=st.integers(1, 50),
    cached=st.integers(0, 60),
    shared=st.integers(0, 60),
)
def test_an_engine_that_miscounts_cannot_make_the_usage_dishonest(
    tokenizer, prompt_len, cached, shared
):
    sequence = SequenceOutput(tokenizer, PLAIN)
    usage = PromptUsage(prompt_len, 0, cached, shared)
    sequence.feed(RequestOutput("x", token_ids=(5,), usage=usage))
    told = total_usage([sequence], 1, [prompt_len]).prompt_tokens_details
    assert told.shared_tokens <= told.cached_tokens <= prompt_len
    if shared <= cached <= prompt_len:
        assert (told.cached_tokens, told.shared_tokens) == (cached, shared)


def test_a_miscount_is_logged(tokenizer, caplog):
    sequence = SequenceOutput(tokenizer, PLAIN)
    sequence.feed(RequestOutput("x", token_ids=(5,), usage=PromptUsage(3, 0, 4, 0)))
    total_usage([sequence], 1, [3])
    assert "cached_tokens=4" in caplog.text


def test_no_more_sequences_than_the_server_holds(tokenizer):
    config = fake_config(max_queue=4)
    with running_server(fake_engine(tokenizer, config)) as client:
        answer = client.complete(["a", "b"], n=19)
        assert answer.status == 400
        assert "38 sequences; the server holds 36" in answer.error["message"]
        assert client.engine.submitted == []
