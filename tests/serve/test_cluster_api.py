"""What a frontend lets launchers see and say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pshare_jax.cluster.secret import split_address
from pshare_jax.config import ClusterConfig, ServerConfig
from pshare_jax.core.load import Load
from pshare_jax.errors import ConfigError
from pshare_jax.serve.frontend_client import FrontendClient, NoAnswerError, State
from pshare_jax.text.tokenizer import Tokenizer
from tests.serve.fake import FakeOrchestrator, fake_config, fake_engine
from tests.serve.server import Client, running_server
from tests.serve.test_tls import make

TOKEN = "a token that is long enough"
LOAD = Load(5, 10, 2, 300, 1.5, 4, 40, 1)
PATH = "/cluster/workers"


class FakeFrontend(FakeOrchestrator):
    """Keeps what it is told of."""

    addresses = ("127.0.0.1:1", "127.0.0.1:2")

    def set_workers(self, addresses: list[str]) -> None:
        for address in addresses:
            split_address(address)
        if not addresses:
            raise ConfigError("a frontend needs at least one worker")
        self.addresses = tuple(addresses)

    def workers(self) -> dict[str, str]:
        return dict.fromkeys(self.addresses, "warming up")

    def load(self) -> Load:
        return LOAD


def frontend(tokenizer: Tokenizer, token_file: str = "", **server: str) -> FakeFrontend:
    settings = ClusterConfig(workers=["127.0.0.1:1"], token_file=token_file)
    config = replace(fake_config(api_key="k" * 16, **server), cluster=settings)
    engine = fake_engine(tokenizer, config)
    engine.__class__ = FakeFrontend
    return engine  # type: ignore[return-value]


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    path = tmp_path / "token"
    path.write_text(TOKEN)
    return str(path)


@pytest.fixture
def server(tokenizer: Tokenizer, token_file: str) -> Iterator[Client]:
    with running_server(frontend(tokenizer, token_file)) as client:
        yield client


def test_a_launcher_sees_workers_and_the_load(server: Client) -> None:
    launcher = FrontendClient(ServerConfig(), TOKEN)
    address = f"127.0.0.1:{server.port}"
    why = {"127.0.0.1:1": "warming up", "127.0.0.1:2": "warming up"}
    assert launcher.state(address) == State(why, LOAD)
    launcher.tell(address, ["[::1]:9", "127.0.0.1:2"])
    assert list(launcher.state(address).workers) == ["[::1]:9", "127.0.0.1:2"]


@pytest.mark.parametrize("workers", [[], ["here"]])
def test_what_makes_no_sense_changes_nothing(server: Client, workers: list[str]) -> None:
    launcher = FrontendClient(ServerConfig(), TOKEN)
    address = f"127.0.0.1:{server.port}"
    with pytest.raises(NoAnswerError, match="400"):
        launcher.tell(address, workers)
    assert list(launcher.state(address).workers) == list(FakeFrontend.addresses)


@pytest.mark.parametrize("key", ["", "k" * 16, TOKEN[:-1], "\xff"])
def test_who_has_not_the_token_of_the_cluster_is_told_nothing(server: Client, key: str) -> None:
    """The keys of clients are none."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    body = json.dumps({"workers": ["127.0.0.1:9"]}).encode()
    answers = [server.get(PATH, **headers), server.request("PUT", PATH, body, headers)]
    assert [answer.status for answer in answers] == [403, 403]
    launcher = FrontendClient(ServerConfig(), TOKEN)
    state = launcher.state(f"127.0.0.1:{server.port}")
    assert list(state.workers) == list(FakeFrontend.addresses)


def test_a_certificate_is_trusted_whatever_host_it_names(
    tokenizer: Tokenizer, token_file: str, tmp_path: Path
) -> None:
    """And no other one."""
    cert, key = make(tmp_path, "one")
    other, _ = make(tmp_path, "other")
    engine = frontend(tokenizer, token_file, tls_cert=cert, tls_key=key)
    with running_server(engine) as client:
        address = f"localhost:{client.port}"
        assert FrontendClient(engine.config.server, TOKEN).state(address).load == LOAD
        with pytest.raises(NoAnswerError, match="certificate"):
            FrontendClient(ServerConfig(tls_cert=other), TOKEN).state(address)


def test_without_a_token_nobody_may(tokenizer: Tokenizer) -> None:
    with running_server(frontend(tokenizer)) as client:
        answer = client.get(PATH, Authorization="Bearer ")
        assert answer.status == 403
        assert "cluster.token_file" in answer.body.decode()


def test_one_process_has_no_such_thing(client: Client) -> None:
    assert client.get(PATH).status == 404


def test_a_frontend_that_does_not_answer_is_named() -> None:
    launcher = FrontendClient(ServerConfig(), TOKEN)
    with pytest.raises(NoAnswerError, match=r"127\.0\.0\.1:1: "):
        launcher.state("127.0.0.1:1")
