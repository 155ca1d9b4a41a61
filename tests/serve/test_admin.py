"""Loading and unloading over HTTP: who may, from where, and what is said."""

from __future__ import annotations

import pytest

from pshare_jax.errors import CertificateError, ConfigError, RequestError
from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import running_server

KEYS = "{keys: [{name: boss, key: boss-key-1, admin: true}, {name: team, key: team-key-1}]}"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of modules, links among them, and one beside it."""
    folder = tmp_path_factory.mktemp("disk")
    root = folder / "modules"
    for path in ("coder", "team/critic", "linked", "../secret"):
        (root / path).mkdir(parents=True)
        (root / path / "pshare.json").write_text("{}")
    (root / "outside").symlink_to(folder / "secret")
    (root / "inside").symlink_to(root / "coder")
    (root / "linked" / "weights").symlink_to(folder / "secret")
    (root / "file").write_text("")
    return root


@pytest.fixture(scope="module")
def client(tokenizer, root):
    config = fake_config(adapter_root=str(root), allow_runtime_loading=True, strict=True)
    with running_server(fake_engine(tokenizer, config)) as client:
        yield client


def load(client, path, name="new", **fields):
    return client.post(LOAD, {"lora_name": name, "lora_path": str(path), **fields})


def test_a_module_comes_and_goes(client, root):
    answer = load(client, "coder")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
    assert answer.body == b"Success: LoRA adapter 'new' added successfully."
    assert client.engine.loaded[-1] == ("new", root / "coder", False)
    assert "new" in [model["id"] for model in client.get("/v1/models").json["data"]]
    assert client.chat("hi", model="new").json["model"] == "new"
    assert (
        client.metric("vllm:request_success_total", model_name="new", finished_reason="stop") == 1
    )
    answer = client.post(UNLOAD, {"lora_name": "new", "lora_int_id": None})
    assert answer.body == b"Success: LoRA adapter 'new' removed successfully."
    assert client.chat("hi", model="new").status == 404
    answer = client.post(UNLOAD, {"lora_name": "new"})
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")


def test_in_place(client, root):
    assert load(client, "team/critic", name="coder", load_inplace=True).status == 200
    assert client.engine.loaded[-1] == ("coder", root / "team/critic", True)
    assert load(client, root / "coder", name="coder", load_inplace=False).status == 200
    assert client.engine.loaded[-1] == ("coder", root / "coder", False)


def test_how_it_writes_calls(client):
    """As said when it was loaded; else as before, or as the chat template tells."""
    for fields, parser, reasoning in (
        ({}, None, False),
        ({"tool_parser": "pythonic", "reasoning": "on"}, "Pythonic", True),
        ({}, "Pythonic", True),
        ({"tool_parser": "none"}, None, True),
        ({"reasoning": "auto"}, None, False),
    ):
        assert load(client, "coder", name="caller", load_inplace=True, **fields).status == 200
        style = client.server.service.format_of("caller")
        assert (style.parser and style.parser.__name__) == parser
        assert style.reasoning == reasoning
    answer = load(client, "coder", name="caller", load_inplace=True, tool_parser="morse")
    assert (answer.status, answer.error["param"]) == (400, "tool_parser")


def test_what_takes_a_modules_place_writes_calls_as_its_own_template_says(client, tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{% if tools %}func_name1({% endif %}")
    own = client.engine.tokenizer.of_module(tmp_path)
    style = client.server.service.format_of
    client.engine.tokenizers["changing"] = own
    assert load(client, "coder", name="changing").status == 200
    assert style("changing").parser.__name__ == "Pythonic"
    del client.engine.tokenizers["changing"]
    assert load(client, "coder", name="changing", load_inplace=True).status == 200
    assert style("changing") == style("planner")
    # What was said of it by name stays.
    client.engine.tokenizers["changing"] = own
    fields = {"load_inplace": True, "tool_parser": "mistral"}
    assert load(client, "coder", name="changing", **fields).status == 200
    assert load(client, "coder", name="changing", load_inplace=True).status == 200
    assert style("changing").parser.__name__ == "Mistral"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "without '..'"),
        ("../secret", "without '..'"),
        ("coder/../../secret", "without '..'"),
        ("coder\0", "without '..'"),
        ("/etc", "not below server.adapter_root"),
        (".", "is server.adapter_root itself"),
        ("outside", "leads over a symbolic link"),
        ("inside", "leads over a symbolic link"),
        ("outside/weights", "leads over a symbolic link"),
        ("linked", "holds a symbolic link, 'weights'"),
        ("nothing", "is no folder"),
        ("file", "is no folder"),
        ("x" * 5000, "cannot be read"),
    ],
)
def test_only_folders_below_the_root_are_loaded(client, path, message):
    count = len(client.engine.loaded)
    answer = load(client, path)
    assert (answer.status, answer.error["param"]) == (400, "lora_path")
    assert message in answer.error["message"]
    assert len(client.engine.loaded) == count


@pytest.mark.parametrize(
    ("error", "status", "param"),
    [
        (CertificateError("made for another base"), 400, "lora_path"),
        (ConfigError("is a prefill checkpoint"), 400, "lora_path"),
        (RequestError("no place", "lora_name", "no_room"), 400, "lora_name"),
    ],
)
def test_what_the_engine_refuses(client, monkeypatch, error, status, param):
    monkeypatch.setattr(client.engine, "load_error", error)
    answer = load(client, "coder", name="other")
    assert (answer.status, answer.error["param"]) == (status, param)
    assert str(error) in answer.error["message"]
    assert "other" not in client.engine.models


@pytest.mark.parametrize("body", [{}, {"lora_name": "x"}, {"lora_name": 3, "lora_path": "coder"}])
def test_bodies(client, body):
    assert client.post(LOAD, body).status == 400


class TestWhoMay:
    def ask(self, tokenizer, key="", **server):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with running_server(fake_engine(tokenizer, fake_config(**server))) as client:
            body = {"lora_name": "new", "lora_path": "coder"}
            answers = [client.post(path, body, **headers) for path in (LOAD, UNLOAD)]
            assert answers[0].status == answers[1].status
            return answers[0]

    def test_nobody_where_no_folder_is_named(self, tokenizer):
        answer = self.ask(tokenizer, "k", api_key="k", allow_runtime_loading=True)
        assert (answer.status, answer.error["code"]) == (403, "loading_forbidden")
        assert "adapter_root names no folder" in answer.error["message"]

    def test_nobody_where_there_is_no_key(self, tokenizer, root):
        answer = self.ask(tokenizer, adapter_root=str(root))
        assert answer.status == 403
        assert "allow_runtime_loading" in answer.error["message"]

    def test_an_admin_key(self, tokenizer, root, tmp_path):
        path = tmp_path / "keys.yaml"
        path.write_text(KEYS)
        server = {"adapter_root": str(root), "api_keys_file": str(path)}
        assert self.ask(tokenizer, "boss-key-1", **server).status == 200
        assert self.ask(tokenizer, "team-key-1", **server).status == 403
        assert self.ask(tokenizer, "nobody", **server).status == 401
        everybody = {**server, "allow_runtime_loading": True}
        assert self.ask(tokenizer, "team-key-1", **everybody).status == 200
