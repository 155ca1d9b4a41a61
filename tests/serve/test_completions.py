import pytest

from tests.serve.fake import FakeOrchestrator


def script(engine: FakeOrchestrator, *texts: str, end: bool = True) -> None:
    """Has the engine answer its requests with `texts` in turn."""
    tokenizer, count = engine.tokenizer, len(engine.submitted)
    eos = [tokenizer.eos_token_ids[0]] if end else []
    engine.script = lambda _: [
        *tokenizer.encode(texts[(len(engine.submitted) - 1 - count) % len(texts)]),
        *eos,
    ]


def test_a_prompt_gives_one_text(client):
    answer = client.complete("hello there")
    assert answer.status == 200
    body = answer.json
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert answer.headers["X-Request-Id"] == body["id"]
    assert body["model"] == "planner"
    assert body["choices"] == [
        {
            "index": 0,
            "text": "hello world",
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    tokens = len(client.engine.tokenizer.encode("hello world")) + 1
    prompt_tokens = len(client.engine.tokenizer.encode("hello there"))
    assert body["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
        "prompt_tokens_details": {"cached_tokens": 0, "shared_tokens": 0},
    }
    assert client.engine.submitted[0].prompt_token_ids == tuple(
        client.engine.tokenizer.encode("hello there")
    )


def test_prompts_are_texts_or_token_ids(client):
    encode = client.engine.tokenizer.encode
    ab, ba = encode("ab"), encode("ba")
    for prompt, expected in [
        ("ab", [ab]),
        (["ab", "ba"], [ab, ba]),
        (ab, [ab]),
        ([ab, ba, ab], [ab, ba, ab]),
    ]:
        client.engine.submitted.clear()
        answer = client.complete(prompt)
        assert answer.status == 200
        assert [list(r.prompt_token_ids) for r in client.engine.submitted] == expected
        assert [c["index"] for c in answer.json["choices"]] == list(range(len(expected)))
        assert answer.json["usage"]["prompt_tokens"] == sum(map(len, expected))


def test_n_samples_of_each_prompt_have_seeds_of_their_own(client):
    script(client.engine, "one", "two", "three", "four")
    answer = client.complete(["a", "b"], n=2, seed=7, best_of=2)
    assert [c["text"] for c in answer.json["choices"]] == ["one", "two", "three", "four"]
    requests = client.engine.submitted
    assert [r.params.seed for r in requests] == [7, 8, 7, 8]
    base = answer.json["id"]
    assert [r.id for r in requests] == [f"{base}-{i}" for i in range(4)]


@pytest.mark.parametrize("seed", [-1, 2**63 - 1, -(2**63), 2**32 - 1])
def test_any_seed_of_64_bits_gives_32_bit_seeds(client, seed):
    assert client.complete(n=3, seed=seed).status == 200
    seeds = [request.params.seed for request in client.engine.submitted]
    assert seeds == [(seed + i) % 2**32 for i in range(3)]


def test_no_seed_stays_none(client):
    client.complete()
    assert client.engine.submitted[0].params.seed is None


def test_max_tokens_is_16_unless_given_and_bounds_the_answer(client):
    script(client.engine, "x", end=False)
    body = client.complete().json
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 16
    body = client.complete(max_tokens=3).json
    assert body["choices"][0]["text"] == "xxx"
    assert body["usage"]["completion_tokens"] == 3


def test_the_default_max_tokens_is_cut_to_the_room_that_is_left(client):
    assert client.complete([5] * 250).status == 200
    assert client.engine.submitted[0].params.max_tokens == 6


def test_echo_puts_the_prompt_first(client):
    ids = client.engine.tokenizer.encode("the dog")
    assert client.complete("hey, ", echo=True).json["choices"][0]["text"] == "hey, hello world"
    assert client.complete(ids, echo=True).json["choices"][0]["text"] == "the doghello world"
    events = client.complete("hey, ", echo=True, stream=True).events
    assert "".join(e["choices"][0]["text"] for e in events[:-1]) == "hey, hello world"


def test_all_parameters_reach_the_engine(client):
    answer = client.complete(
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        repetition_penalty=1.5,
        presence_penalty=-1,
        frequency_penalty=2,
        logit_bias={"3": 5, "7": -100},
        logprobs=2,
        stop_token_ids=[9],
        ignore_eos=True,
        max_tokens=4,
        cache_salt="tenant",
        user="u",
        metadata={"a": 1},
    )
    assert answer.status == 200
    request = client.engine.submitted[0]
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 40, 0.1)
    assert (params.repetition_penalty, params.presence_penalty) == (1.5, -1.0)
    assert params.frequency_penalty == 2.0
    assert params.logit_bias == {3: 5.0, 7: -100.0}
    assert (params.logprobs, params.stop_token_ids, params.ignore_eos) == (2, (9,), True)
    assert (params.max_tokens, request.cache_salt) == (4, "tenant")


def test_top_k_is_off_or_at_most_the_vocabulary(client):
    for top_k in (-1, 0, None, 5, 10**12):
        assert client.complete(top_k=top_k).status == 200
    vocab_size = client.engine.model_config.vocab_size
    assert [r.params.top_k for r in client.engine.submitted] == [0, 0, 0, 5, vocab_size]


def test_a_temperature_too_small_for_float32_is_greedy(client):
    client.complete(temperature=1e-300)
    client.complete(temperature=0.01)
    assert [r.params.temperature for r in client.engine.submitted] == [0.0, 0.01]


class TestStop:
    def test_a_stop_string_ends_the_text_and_the_sequence(self, client):
        script(client.engine, "hello world, how are you", end=False)
        body = client.complete(max_tokens=200, stop=["o w", "never"]).json
        choice = body["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("hell", "stop")
        assert choice["stop_reason"] == "o w"
        assert client.engine.aborted == [client.engine.submitted[0].id]
        # Counted up to the token that completed the stop string.
        encode, decode = client.engine.tokenizer.encode, client.engine.tokenizer.decode
        ids = encode("hello world, how are you")
        completed = next(i for i in range(len(ids)) if "o w" in decode(ids[:i]))
        assert body["usage"]["completion_tokens"] == completed

    def test_include_stop_str_in_output(self, client):
        script(client.engine, "hello world, how are you")
        body = client.complete(stop="wor", include_stop_str_in_output=True).json
        assert body["choices"][0]["text"] == "hello wor"

    def test_text_held_back_for_a_stop_string_comes_at_the_end(self, client):
        for stream in (False, True):
            answer = client.complete(stop="world!", stream=stream)
            events = answer.events[:-1] if stream else [answer.json]
            assert "".join(e["choices"][0]["text"] for e in events) == "hello world"

    def test_a_stop_token_is_named_and_is_no_text(self, client):
        space = client.engine.tokenizer.encode("hello world")[-1]
        body = client.complete(stop_token_ids=[space]).json
        choice = body["choices"][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", space)
        assert choice["text"] == "hello world".removesuffix(client.engine.tokenizer.decode([space]))

    def test_special_tokens_are_shown_only_when_asked_for(self, client):
        script(client.engine, "a<|im_start|>b", end=False)
        shown = client.complete(max_tokens=3, skip_special_tokens=False).json["choices"][0]["text"]
        hidden = client.complete(max_tokens=3).json["choices"][0]["text"]
        assert (shown, hidden) == ("a<|im_start|>b", "ab")

    def test_ignore_eos_goes_on_to_the_limit(self, client):
        body = client.complete(ignore_eos=True, max_tokens=30).json
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == 30


class TestTokenIds:
    def test_every_generated_token_is_listed(self, client):
        tokenizer = client.engine.tokenizer
        ids = [*tokenizer.encode("hello world"), tokenizer.eos_token_ids[0]]
        body = client.complete(return_token_ids=True).json
        assert body["choices"][0]["token_ids"] == ids
        assert body["usage"]["completion_tokens"] == len(ids)
        for off in (False, None):
            assert "token_ids" not in client.complete(return_token_ids=off).json["choices"][0]

    def test_a_stream_lists_each_token_once_though_its_text_is_held_back(self, client):
        script(client.engine, "naïve 🙂 hello", end=False)
        ids = client.engine.tokenizer.encode("naïve 🙂 hello")
        answer = client.complete(
            stream=True, max_tokens=len(ids), stop="hello!", return_token_ids=True
        )
        *chunks, _ = answer.events
        assert [i for c in chunks for i in c["choices"][0]["token_ids"]] == ids
        assert "".join(c["choices"][0]["text"] for c in chunks) == "naïve 🙂 hello"

    def test_a_chat_has_them_too(self, client):
        body = client.chat(return_token_ids=True).json
        expected = [*client.engine.tokenizer.encode("hello world"), 2]
        assert body["choices"][0]["token_ids"] == expected
        assert body["prompt_token_ids"] == list(client.engine.submitted[-1].prompt_token_ids)
        first, *chunks, _ = client.chat(return_token_ids=True, stream=True).events
        assert first["prompt_token_ids"] == body["prompt_token_ids"]
        assert [i for c in chunks for i in c["choices"][0]["token_ids"]] == expected
        assert not any("prompt_token_ids" in chunk for chunk in chunks)


class TestLogprobs:
    def test_chosen_and_most_likely_tokens(self, client):
        script(client.engine, "hello world")
        choice = client.complete(logprobs=3).json["choices"][0]
        tokenizer = client.engine.tokenizer
        ids = tokenizer.encode("hello world")
        logprobs = choice["logprobs"]
        assert logprobs["tokens"] == [tokenizer.token_text(i) for i in ids]
        assert "".join(logprobs["tokens"]) == choice["text"]
        assert logprobs["token_logprobs"] == [-0.5] * len(ids)
        for token_id, top in zip(ids, logprobs["top_logprobs"], strict=True):
            names = [tokenizer.token_text(token_id + step) for step in (1, 0, 2)]
            assert top == dict(zip(names, [-0.25, -0.5, -1.0], strict=True))
        offsets = logprobs["text_offset"]
        lengths = list(map(len, logprobs["tokens"]))
        assert offsets == [sum(lengths[:i]) for i in range(len(lengths))]

    def test_zero_lists_the_chosen_token_alone(self, client):
        logprobs = client.complete(logprobs=0).json["choices"][0]["logprobs"]
        assert logprobs["top_logprobs"] == [{token: -0.5} for token in logprobs["tokens"]]

    def test_an_impossible_token_is_still_json(self, client):
        logprobs = client.complete(logprobs=20).json["choices"][0]["logprobs"]
        assert min(logprobs["top_logprobs"][0].values()) == -9999.0

    def test_a_cut_stop_string_takes_its_tokens_along(self, client):
        script(client.engine, "hello world, how are you", end=False)
        for fields in ({}, {"stream": True}):
            answer = client.complete(stop=" world", logprobs=1, max_tokens=50, **fields)
            bodies = answer.events[:-1] if fields else [answer.json]
            tokens = [t for b in bodies for t in b["choices"][0]["logprobs"]["tokens"]]
            assert "".join(tokens) == "hello"

    def test_parts_of_a_character_are_named_by_their_bytes(self, client):
        script(client.engine, "\U0001f9ff")
        choice = client.complete(logprobs=1).json["choices"][0]
        assert choice["text"] == "\U0001f9ff"
        assert choice["logprobs"]["tokens"][0] == "bytes:\\xf0\\x9f"
        assert set(choice["logprobs"]["text_offset"]) == {0}


@pytest.mark.parametrize("tokens_per_event", [1, 3, 64])
def test_the_answer_does_not_depend_on_how_many_tokens_come_at_once(client, tokens_per_event):
    client.engine.tokens_per_event = tokens_per_event
    script(client.engine, "naïve café 你好 🙂 END more text", end=False)
    body = client.complete(stop="END", max_tokens=100, logprobs=1).json
    assert body["choices"][0]["text"] == "naïve café 你好 🙂 "
    decode = client.engine.tokenizer.decode
    ids = client.engine.tokenizer.encode("naïve café 你好 🙂 END more text")
    completed = next(i for i in range(len(ids)) if "END" in decode(ids[:i]))
    assert body["usage"]["completion_tokens"] == completed
