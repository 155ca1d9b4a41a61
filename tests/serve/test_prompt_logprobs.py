"""A prompt's own log-probabilities: `echo` with `logprobs`, and vLLM's `prompt_logprobs`."""

from operator import itemgetter

import openai
import pytest

from pshare_jax.core.requests import TokenLogprobs
from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import running_server

TEXT = "hello there"


@pytest.fixture(scope="module")
def client(tokenizer):
    with running_server(fake_engine(tokenizer)) as client:
        yield client


def names(client, text: str) -> list[str]:
    tokenizer = client.engine.tokenizer
    return [tokenizer.token_text(i) for i in tokenizer.encode(text)]


def test_one_entry_for_each_token_of_prompt_and_answer(client):
    """The request of lm-eval and GuideLLM; the first token has no probability."""
    body = client.complete(TEXT, echo=True, logprobs=1, max_tokens=1, temperature=0).json
    [choice] = body["choices"]
    logprobs = choice["logprobs"]
    prompt, answer = names(client, TEXT), names(client, "hello world")[:1]
    assert logprobs["tokens"] == prompt + answer
    assert choice["text"] == TEXT + answer[0]
    assert logprobs["token_logprobs"] == [None] + [-0.5] * len(prompt)
    first, *top = logprobs["top_logprobs"]
    assert first is None
    # The likeliest, and the one that stands there.
    assert [sorted(entry.values()) for entry in top] == [[-0.5, -0.25]] * len(prompt)
    assert all(
        entry[token] == -0.5 for entry, token in zip(top, logprobs["tokens"][1:], strict=True)
    )
    lengths = [len(token) for token in logprobs["tokens"]]
    assert logprobs["text_offset"] == [sum(lengths[:i]) for i in range(len(lengths))]
    assert body["usage"]["completion_tokens"] == 1


def test_no_token_but_the_prompt(client):
    body = client.complete(TEXT, echo=True, logprobs=0, max_tokens=0).json
    [choice] = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == (TEXT, "length")
    assert choice["logprobs"]["tokens"] == names(client, TEXT)
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert body["usage"]["completion_tokens"] == 0
    assert body["usage"]["prompt_tokens"] == len(names(client, TEXT))


def test_an_echo_of_no_token(client):
    [choice] = client.complete(TEXT, echo=True, max_tokens=0).json["choices"]
    assert (choice["text"], choice["logprobs"]) == (TEXT, None)
    chunks = client.complete(TEXT, echo=True, max_tokens=0, stream=True).events[:-1]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT


def test_lm_eval_reads_log_likelihoods(client):
    """What lm-eval's `local-completions` sends for a batch of contexts and continuations, and how
    it reads the answer."""
    tokenizer = client.engine.tokenizer
    contexts = [tokenizer.encode(text) for text in ("the dog", "hello")]
    continuations = [tokenizer.encode(text) for text in (" is here", " world")]
    prompts = [a + b for a, b in zip(contexts, continuations, strict=True)]
    answer = openai.OpenAI(base_url=f"{client.url}/v1", api_key="none").completions.create(
        model="planner",
        prompt=prompts,
        temperature=0,
        max_tokens=1,
        logprobs=1,
        seed=1234,
        echo=True,
    )
    choices = sorted(answer.model_dump()["choices"], key=itemgetter("index"))
    assert len(choices) == 2
    for choice, context, continuation in zip(choices, contexts, continuations, strict=True):
        scores = choice["logprobs"]["token_logprobs"][len(context) : -1]
        top = choice["logprobs"]["top_logprobs"][len(context) : -1]
        assert sum(scores) == -0.5 * len(continuation)
        assert len(top) == len(continuation)
        assert not all(s == max(t.values()) for s, t in zip(scores, top, strict=True))


def test_a_stream_echoes_them_once(client):
    whole = client.complete(TEXT, echo=True, logprobs=2, max_tokens=3).json["choices"][0]
    chunks = client.complete(TEXT, echo=True, logprobs=2, max_tokens=3, stream=True).events[:-1]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    for field, values in whole["logprobs"].items():
        assert [v for choice in choices for v in choice["logprobs"][field]] == values


def test_several_samples_score_the_prompt_once(client):
    client.engine.submitted.clear()
    body = client.complete([TEXT, "bye"], n=2, echo=True, logprobs=0, max_tokens=1).json
    texts = [choice["logprobs"]["tokens"][:-1] for choice in body["choices"]]
    assert texts == [names(client, TEXT)] * 2 + [names(client, "bye")] * 2
    asked = [request.params.prompt_logprobs for request in client.engine.submitted]
    assert asked == [0, None, 0, None]


def test_vllm_lists_them_by_token_id(client):
    ids = client.engine.tokenizer.encode(TEXT)
    [choice] = client.complete(TEXT, prompt_logprobs=1, max_tokens=1).json["choices"]
    first, *entries = choice["prompt_logprobs"]
    assert first is None
    assert choice["logprobs"] is None
    text = client.engine.tokenizer.token_text
    for token_id, entry in zip(ids[1:], entries, strict=True):
        likeliest = (token_id + 1) % 400
        assert entry == {
            str(likeliest): {"logprob": -0.25, "rank": 1, "decoded_token": text(likeliest)},
            str(token_id): {"logprob": -0.5, "rank": None, "decoded_token": text(token_id)},
        }
    [choice] = client.complete(TEXT, prompt_logprobs=2, max_tokens=1).json["choices"]
    assert choice["prompt_logprobs"][1][str(ids[1])]["rank"] == 2


def test_a_chat_lists_them_for_the_whole_answer(client):
    body = client.chat(TEXT, prompt_logprobs=0, max_tokens=1).json
    assert len(body["prompt_logprobs"]) == body["usage"]["prompt_tokens"]
    assert body["prompt_logprobs"][0] is None
    assert all(len(entry) == 1 for entry in body["prompt_logprobs"][1:])
    assert "prompt_logprobs" not in client.chat(TEXT).json
    assert (
        client.chat(TEXT, prompt_logprobs=0, max_tokens=0).json["usage"]["completion_tokens"] == 0
    )


def test_there_is_a_limit_for_each_request(tokenizer):
    with running_server(fake_engine(tokenizer, fake_config(max_scored_tokens=20))) as client:
        assert client.complete([[5] * 10] * 2, echo=True, logprobs=0).status == 200
        answer = client.complete([[5] * 10, [5] * 11], echo=True, logprobs=0)
        assert answer.status == 400
        assert "21 prompt tokens are asked for; the server takes 20" in answer.error["message"]
        assert client.complete([[5] * 10, [5] * 11], echo=True).status == 200


class TestBestOf:
    SCORES = (-2.0, -0.1, -3.0, -1.0)

    def answer(self, client, **fields):
        """Sample i says the i-th word, each of its tokens with the i-th log-probability."""
        engine = client.engine
        words = [engine.tokenizer.encode(word) for word in ("a", "b", "c", "d")]
        end = engine.tokenizer.eos_token_ids[0]
        script, logprobs = engine.script, engine._logprobs
        engine.script = lambda request: [*words[int(request.id.rpartition("-")[2])], end]
        known = {word[0]: score for word, score in zip(words, self.SCORES, strict=True)}
        engine._logprobs = lambda ids, count: (
            () if count is None else tuple(TokenLogprobs(known.get(i, 0.0)) for i in ids)
        )
        try:
            return client.complete(best_of=4, **fields).json
        finally:
            engine.script, engine._logprobs = script, logprobs

    def test_the_likeliest_come_first(self, client):
        body = self.answer(client, n=2)
        assert [choice["text"] for choice in body["choices"]] == ["b", "d"]
        assert [choice["index"] for choice in body["choices"]] == [0, 1]
        assert all(choice["logprobs"] is None for choice in body["choices"])
        # What was generated is paid for.
        assert body["usage"]["completion_tokens"] == 8

    def test_one_by_default(self, client):
        assert [choice["text"] for choice in self.answer(client)["choices"]] == ["b"]

    def test_all_of_them_are_in_order_of_their_making(self, client):
        body = self.answer(client, n=4)
        assert [choice["text"] for choice in body["choices"]] == ["a", "b", "c", "d"]
