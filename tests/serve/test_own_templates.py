"""Models with a chat template and end tokens of their own, behind one server."""

from __future__ import annotations

import pytest

from pshare_jax.serve import templates
from tests.serve.fake import fake_engine
from tests.serve.server import running_server

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def own(tokenizer, tmp_path):
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    return tokenizer.of_module(tmp_path)


def chat(client, model: str) -> dict:
    answer = client.post("/v1/chat/completions", {"model": model, "messages": MESSAGES})
    assert answer.status == 200
    return answer.json


def test_a_chat_is_rendered_by_the_template_of_its_model(tokenizer, own):
    engine = fake_engine(tokenizer)
    engine.tokenizers["coder"] = own
    with running_server(engine) as client:
        chat(client, "coder")
        chat(client, "planner")
        tokens = client.post("/tokenize", {"model": "coder", "messages": MESSAGES}).json["tokens"]
    theirs, ours = (request.prompt_token_ids for request in engine.submitted)
    assert tokenizer.decode(theirs) == "[user] hi\n"
    assert list(theirs) == tokens
    assert list(ours) == tokenizer.encode(tokenizer.apply_chat_template(MESSAGES), False)


def test_models_say_which_template_they_have(tokenizer, own):
    engine = fake_engine(tokenizer)
    engine.tokenizers["coder"] = own
    with running_server(engine) as client:
        cards = {card["id"]: card for card in client.get("/v1/models").json["data"]}
    names = {model: card["chat_template"] for model, card in cards.items()}
    assert names["planner"] == names["team/critic"] != names["coder"]
    assert all(len(name) == 12 for name in names.values())


def test_an_end_token_of_its_own_is_no_stop_token_of_the_client(tokenizer, own):
    engine = fake_engine(tokenizer)
    engine.script = lambda request: [30, 31, 7]
    engine.tokenizers["coder"] = own
    with running_server(engine) as client:
        choice = chat(client, "coder")["choices"][0]
    assert (choice["finish_reason"], choice.get("stop_reason")) == ("stop", None)


def lost(client) -> dict[str, float]:
    name = "pshare_template_lost_tokens_total"
    return {model: client.metric(name, model_name=model) for model in ("planner", "coder")}


def test_what_templates_lose_is_counted(tokenizer, own):
    """Once for each template: its own earlier chats are found in its cache."""
    engine = fake_engine(tokenizer)
    engine.tokenizers["coder"] = own
    context = [{"role": "user", "content": "one two three " * 8}]
    longer = [*context, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "why"}]

    def ask(client, model: str, messages: list) -> int:
        body = {"model": model, "messages": messages}
        assert client.post("/v1/chat/completions", body).status == 200
        return len(engine.submitted[-1].prompt_token_ids)

    with running_server(engine) as client:
        ask(client, "planner", context)
        ask(client, "team/critic", context)
        assert set(lost(client).values()) == {0}
        whole = ask(client, "coder", context)
        assert lost(client)["coder"] == whole
        ask(client, "coder", context)
        ask(client, "coder", longer)
        assert lost(client)["coder"] == whole
        asked = ask(client, "planner", longer)
        # All of it but what its own first chat had.
        assert 0 < lost(client)["planner"] < asked - whole // 2
        ask(client, "coder", [{"role": "user", "content": "something new"}])
        ask(client, "planner", [{"role": "user", "content": "another thing"}])
        assert lost(client)["coder"] == whole


def test_where_all_templates_are_one_nothing_is_kept(tokenizer):
    engine = fake_engine(tokenizer)
    with running_server(engine) as client:
        for model in ("planner", "coder"):
            chat(client, model)
        assert set(lost(client).values()) == {0}


def test_what_is_remembered_of_chats_is_bounded(tokenizer, own, monkeypatch):
    monkeypatch.setattr(templates, "MOST_REMEMBERED", 4)
    engine = fake_engine(tokenizer)
    engine.tokenizers["coder"] = own
    losses = templates.TemplateLosses(engine)
    chats = [templates.beginnings([], [{"content": str(i)}]) for i in range(6)]
    for begun in chats:
        losses.chat("planner", begun, 10)
    for begun in chats:
        losses.chat("coder", begun, 10)
    [family] = losses.collect()
    counts = {sample.labels["model_name"]: sample.value for sample in family.samples}
    # The first two had gone, and by coming again they made the others go.
    assert counts == {"planner": 0, "coder": 0, "team/critic": 0}
    losses.chat("planner", chats[-1], 10)
    assert {s.labels["model_name"]: s.value for f in losses.collect() for s in f.samples} == {
        "planner": 10,
        "coder": 0,
        "team/critic": 0,
    }
