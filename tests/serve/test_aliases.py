"""Other names of a model: all endpoints know them, and answers say which model it is."""

from __future__ import annotations

import dataclasses

import pytest

from pshare_jax.config import ModelEntry
from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import running_server


@pytest.fixture(scope="module")
def client(tokenizer, tmp_path_factory):
    config = fake_config(
        adapter_root=str(tmp_path_factory.mktemp("modules")), allow_runtime_loading=True
    )
    entries = [
        ModelEntry("planner", aliases=["gpt-4o", "org/planner"]),
        ModelEntry("coder", tool_parser="pythonic", aliases=["codex"]),
        ModelEntry("team/critic"),
    ]
    engine = fake_engine(tokenizer, dataclasses.replace(config, models=entries))
    with running_server(engine) as client:
        yield client


BODIES = {
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5},
}


@pytest.mark.parametrize("path", BODIES)
def test_a_model_answers_to_its_aliases(client, path):
    answer = client.post(path, {"model": "gpt-4o", **BODIES[path]})
    assert (answer.status, answer.json["model"]) == (200, "planner")
    assert client.engine.submitted[-1].model == "planner"


def test_the_small_endpoints_know_them(client):
    chat = BODIES["/v1/chat/completions"]
    for path in ("/tokenize", "/v1/messages/count_tokens"):
        named = [client.post(path, {"model": name, **chat}) for name in ("codex", "coder")]
        assert named[0].status == 200
        assert named[0].json == named[1].json
    assert client.post("/detokenize", {"model": "codex", "tokens": [1]}).status == 200


def test_they_are_listed(client):
    cards = {card["id"]: card["root"] for card in client.get("/v1/models").json["data"]}
    assert cards == {
        "planner": "planner",
        "coder": "coder",
        "team/critic": "team/critic",
        "gpt-4o": "planner",
        "org/planner": "planner",
        "codex": "coder",
    }
    card = client.get("/v1/models/org/planner").json
    assert (card["id"], card["root"]) == ("org/planner", "planner")
    assert client.get("/v1/models/other").status == 404


def test_a_fanout_sees_one_model_behind_two_names(client):
    body = {"messages": BODIES["/v1/chat/completions"]["messages"]}
    answer = client.post("/v1/fanout", {"model": ["gpt-4o", "planner"], **body})
    assert (answer.status, answer.error["param"]) == (400, "model")
    answer = client.post("/v1/fanout", {"model": ["gpt-4o", "codex"], **body})
    assert answer.status == 200
    assert {r.model for r in client.engine.submitted[-2:]} == {"planner", "coder"}


def test_hints_may_use_them(client):
    client.post("/v1/completions", {"model": "codex", "prompt": "hi", "next_models": ["gpt-4o"]})
    assert client.engine.submitted[-1].session.next_models == ("planner",)


def test_no_module_is_loaded_under_one(client):
    answer = client.post("/v1/load_lora_adapter", {"lora_name": "gpt-4o", "lora_path": "x"})
    assert (answer.status, answer.error["param"]) == (400, "lora_name")
    assert "alias of model 'planner'" in answer.error["message"]
