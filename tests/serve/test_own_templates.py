"""Models with a chat template and end tokens of their own, behind one server."""

from __future__ import annotations

import pytest

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
