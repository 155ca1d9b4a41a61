"""Decode modules that come and go while the engine runs."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax.numpy as jnp
import pytest

from pshare_jax.config import PrefillConfig, ServeConfig
from pshare_jax.engine import modules
from pshare_jax.engine.orchestrator import Orchestrator
from pshare_jax.engine.sources import ModelSource
from pshare_jax.errors import (
    ConfigError,
    RequestError,
    UnknownModelError,
)
from pshare_jax.models.lora import LoraModule
from pshare_jax.models.weights import LORA_TARGETS
from tests.engine.harness import Client, Models, held, lora_module, serve_config, wait_until
from tests.helpers import tiny_config

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8]
SERVED = ["identity", "lora", "isolated"]


@functools.cache
def all_models() -> Models:
    """Those that are served from the start, and others that tests load; the oracle knows all."""
    config = tiny_config()
    models = Models(config)
    models.add_identity("identity")
    models.add_lora("lora", lora_module(config, 3, rank=2, targets=("q", "v")))
    models.add_full("isolated", 5, isolated=True)
    models.add_lora("lora-b", lora_module(config, 4, rank=4, targets=LORA_TARGETS), tail=5)
    models.add_lora("lora-c", lora_module(config, 6, rank=1, targets=("down", "k")))
    models.add_full("full-a", 7)
    models.add_full("full-b", 8, tail=2)
    return models


def config(**overrides: Any) -> ServeConfig:
    decode = serve_config().decode
    room = dataclasses.replace(decode, max_loras=3, max_lora_rank=4, max_full=3)
    return serve_config(**{"decode": room, **overrides})


@contextmanager
def serving(config: ServeConfig, names: list[str] = SERVED) -> Iterator[Client]:
    models = all_models()
    sources = [source for source in models.sources if source.name in names]
    engine = Orchestrator(config, models.base_source, sources)
    engine.start()
    try:
        yield Client(engine)
    finally:
        engine.stop()
    for cache in engine.caches.values():
        cache.check(idle=True)


@pytest.fixture(scope="module")
def server() -> Iterator[Client]:
    with serving(config()) as client:
        yield client


@pytest.fixture
def client(server: Client) -> Iterator[Client]:
    """The engine, which serves the same models before each test."""
    yield server
    for name in list(server.engine.models):
        if name not in SERVED:
            server.engine.unload_module(name)
    if "lora" not in server.engine.models:
        server.engine.load_module("lora", source("lora"))
    wait_until(lambda: places(server) == 1)


def source(name: str) -> ModelSource:
    return next(source for source in all_models().sources if source.name == name)


def expected(name: str, prompt: list[int] = PROMPT, max_tokens: int = 8) -> list[int]:
    return all_models().expected(name, prompt, max_tokens)


def places(client: Client) -> int:
    """Places that modules of any kind take."""
    return len(client.engine._modules._users)


# XLA's programs take long to compile: few of them.
IN_XLA = {
    "kernel_backend": "xla",
    "prefill": PrefillConfig(chunk_buckets=[16], num_pages=40),
    "decode": dataclasses.replace(config().decode, batch_buckets=[4]),
}


@pytest.mark.parametrize(
    "overrides", [IN_XLA, {"connector": "same-mesh"}], ids=["xla", "same-mesh"]
)
def test_they_answer_as_if_served_from_the_start(overrides: dict[str, Any]) -> None:
    """Whatever the kernels; and nothing compiles."""
    names = ["lora-b", "full-a", "lora-c", "full-b"]
    answers = {name: expected(name) for name in [*SERVED, *names]}
    with serving(config(**overrides)) as client:
        client.generate("lora", PROMPT)
        for name in names:
            info = client.engine.load_module(name, source(name))
            assert (info.name, info.kind) == (name, source(name).kind)
        replies = {name: client.submit(name, PROMPT) for name in answers}
        assert {name: reply.wait().tokens for name, reply in replies.items()} == answers
        assert list(client.engine.models) == [*SERVED, *names]
        for name in ("lora", "lora-b", "full-a"):
            client.engine.unload_module(name)
        assert client.generate("full-b", PROMPT).tokens == answers["full-b"]
        assert client.generate("lora-c", PROMPT).tokens == answers["lora-c"]
        assert client.engine.stats().compiles == 0


def test_a_loaded_module_reads_the_bases_pages(client: Client) -> None:
    client.generate("identity", PROMPT, cache_salt="loaded")
    client.engine.load_module("new", source("lora-b"))
    usage = client.generate("new", PROMPT, cache_salt="loaded").usage
    assert usage is not None
    assert (usage.computed_tokens, usage.shared_tokens) == (0, len(PROMPT) - 5)


@pytest.mark.parametrize("kinds", [("lora", "lora-b"), ("full-a", "full-b"), ("lora", "full-a")])
def test_requests_in_flight_finish_on_the_old_weights(
    client: Client, kinds: tuple[str, str]
) -> None:
    old, new = kinds
    answers = expected(old, max_tokens=40), expected(new)
    client.engine.load_module("agent", source(old))
    with held(client):
        running = client.submit("agent", PROMPT, 40)
        waiting = client.submit("agent", PROMPT, 40)
        wait_until(lambda: client.engine.stats().running["agent"] > 0)
        client.engine.load_module("agent", source(new), replace=True)
        later = client.submit("agent", PROMPT)
    assert running.wait().tokens == waiting.wait().tokens == answers[0]
    assert later.wait().tokens == client.generate("agent", PROMPT).tokens == answers[1]
    # The place of the old weights is free, and so is their memory.
    wait_until(lambda: places(client) == 2)
    wait_until(lambda: num_groups(client) == 1 + new.startswith("full"))


def num_groups(client: Client) -> int:
    """Groups that the decode worker has weights for: the base's, and loaded full modules."""
    groups = client.engine.workers.decode[0].executor._groups
    return len([name for name in groups if name != "full/isolated"])


def test_a_preempted_request_comes_back_to_its_old_weights(client: Client) -> None:
    prompts = [[i, *PROMPT] for i in range(6)]
    answers = [expected("full-a", prompt, 100) for prompt in prompts]
    client.engine.load_module("agent", source("full-a"))
    before = sum(client.engine.stats().preemptions.values())
    with held(client, rows=2):
        replies = [client.submit("agent", prompt, 100) for prompt in prompts]
        wait_until(lambda: client.engine.stats().running["agent"] >= 2)
        client.engine.load_module("agent", source("full-b"), replace=True)
    assert [reply.wait().tokens for reply in replies] == answers
    assert sum(client.engine.stats().preemptions.values()) > before


def test_scores_in_flight_are_the_old_modules(client: Client) -> None:
    """Their probes come after the module has been replaced."""
    scores = all_models().expected_scores("full-a", PROMPT)
    client.engine.load_module("agent", source("full-a"))
    with held(client):
        reply = client.submit("agent", PROMPT, 1, prompt_logprobs=0)
        wait_until(lambda: client.engine.stats().running["agent"] == 1)
        client.engine.load_module("agent", source("lora-b"), replace=True)
        client.engine.unload_module("agent")
    found = reply.wait().prompt_logprobs
    assert found is not None
    wanted = [scores[i][token] for i, token in enumerate(PROMPT)][1:]
    assert [score.logprob for score in found[1:]] == pytest.approx(wanted, abs=1e-4)


def test_unloading_lets_what_runs_end(client: Client) -> None:
    answer = expected("lora", max_tokens=40)
    with held(client):
        reply = client.submit("lora", PROMPT, 40)
        wait_until(lambda: client.engine.stats().running["lora"] == 1)
        client.engine.unload_module("lora")
        assert "lora" not in client.engine.models
        assert client.engine.stats().running["lora"] == 1
        with pytest.raises(UnknownModelError, match="'lora' is not served"):
            client.submit("lora", PROMPT)
        assert places(client) == 1
    assert reply.wait().tokens == answer
    wait_until(lambda: places(client) == 0)


def test_there_is_room_for_so_many(client: Client) -> None:
    engine = client.engine
    for name in ("a", "b"):
        engine.load_module(name, source("lora-b"), replace=True)
    with pytest.raises(RequestError, match="all of the 3 places for LoRA modules") as caught:
        engine.load_module("c", source("lora-c"))
    assert caught.value.code == "no_room"
    # A place is free when the last request of its module has ended.
    with held(client):
        reply = client.submit("a", PROMPT, 30)
        wait_until(lambda: engine.stats().running["a"] == 1)
        engine.unload_module("a")
        with pytest.raises(RequestError, match="all of the 3 places"):
            engine.load_module("c", source("lora-c"))
    reply.wait()
    wait_until(lambda: places(client) == 2)
    engine.load_module("c", source("lora-c"))
    for name in ("x", "y", "z"):
        engine.load_module(name, source("full-a"), replace=True)
    with pytest.raises(RequestError, match="3 full modules are loaded") as caught:
        engine.load_module("w", source("full-b"))
    assert caught.value.code == "no_room"


@pytest.mark.parametrize("name", ["lora-b", "full-a"])
def test_an_alias_takes_no_room(client: Client, name: str) -> None:
    engine = client.engine
    for alias in ("one", "two", "three", "four"):
        engine.load_module(alias, source(name))
    assert places(client) == 2
    engine.unload_module("one")
    answer = expected(name)
    assert client.generate("four", PROMPT).tokens == client.generate("two", PROMPT).tokens == answer
    engine.load_module("lora-alias", source("lora"))
    assert places(client) == 2


def test_names_of_the_past_do_not_confuse(client: Client) -> None:
    """A name may come back, and one may look like what the engine calls another's second coming."""
    answers = {name: expected(name) for name in ("lora-b", "lora-c")}
    before = client.engine.stats().generation_tokens.get("again", 0)
    for name in ("lora-b", "lora-c", "lora-b"):
        client.engine.load_module("again", source(name))
        assert client.generate("again", PROMPT).tokens == answers[name]
        client.engine.unload_module("again")
        wait_until(lambda: places(client) == 1)
    client.engine.load_module("again@2", source("lora-c"))
    assert client.generate("again@2", PROMPT).tokens == answers["lora-c"]
    assert client.engine.stats().generation_tokens["again"] == before + 24
    assert client.engine.stats().generation_tokens["again@2"] == 8


def test_others_go_on_while_one_is_loaded(client: Client) -> None:
    """Loading waits here until another stream has got more tokens: it is not done in the engine's
    thread, nor does that wait for it."""
    tokens, enough = [0], threading.Event()

    def count(event: Any) -> None:
        tokens[0] += len(event.token_ids)
        if tokens[0] >= 60:
            enough.set()

    plain = source("full-a")

    def load(shardings: Any) -> Any:
        assert enough.wait(60)
        return plain.load(shardings)

    reply = client.submit("identity", PROMPT, 100, then=count)
    client.engine.load_module("slow", dataclasses.replace(plain, load=load))
    assert client.generate("slow", PROMPT).tokens == expected("full-a")
    assert len(reply.wait().tokens) == 100


def test_a_failed_load_leaves_everything_as_it_was(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(shardings: Any) -> Any:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        client.engine.load_module("x", dataclasses.replace(source("full-a"), load=load))
    module = lora_module(tiny_config(), 9, rank=2, targets=("q",))
    broken = {name: factor * jnp.nan for name, factor in module.weights.items()}
    for bad, message in (
        (module._replace(weights=broken), "not finite"),
        (lora_module(tiny_config(), 9, rank=5, targets=("q",)), "ranks up to 4"),
    ):
        with pytest.raises(RequestError, match=message):
            client.engine.load_module("x", lora_source(bad))
    monkeypatch.setattr(modules, "available_bytes", lambda device: 1000)
    for name in ("full-a", "lora-b"):
        with pytest.raises(RequestError, match=r"would take .* MB; 0 MB are free"):
            client.engine.load_module("x", source(name))
    assert "x" not in client.engine.models
    assert places(client) == 1
    assert client.generate("lora", PROMPT).tokens == expected("lora")


def lora_source(module: LoraModule) -> ModelSource:
    models = Models(tiny_config())
    models.add_lora("bad", module)
    return models.sources[0]


@pytest.mark.parametrize(
    ("name", "replace", "message"),
    [
        ("lora", False, "'lora' is served already; load_inplace: true"),
        ("identity", True, "the base's own weights"),
        ("isolated", True, "isolated"),
        ("", False, "1 to 256 printable"),
        ("a\nb", False, "1 to 256 printable"),
        ("a" * 257, False, "1 to 256 printable"),
    ],
)
def test_names_that_cannot_be_loaded(
    client: Client, name: str, replace: bool, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        client.engine.load_module(name, source("lora-b"), replace=replace)


@pytest.mark.parametrize("name", ["identity", "isolated"])
def test_what_stays(client: Client, name: str) -> None:
    with pytest.raises(RequestError, match="come and go"):
        client.engine.unload_module(name)


def test_an_unknown_name(client: Client) -> None:
    with pytest.raises(UnknownModelError):
        client.engine.unload_module("nobody")


@pytest.mark.parametrize(
    ("room", "message"),
    [
        ({"max_loras": 1}, "decode.max_loras: 1, but 2"),
        ({"max_full": 1}, "decode.max_full: 1, but 2"),
        ({"max_loras": 9, "max_lora_rank": 3}, "decode.max_lora_rank: 3, but .* rank 4"),
        ({"max_loras": -1}, "must not be negative"),
    ],
    ids=str,
)
def test_configurations_without_room(room: dict[str, int], message: str) -> None:
    models = all_models()
    names = ("lora", "lora-b", "full-a", "full-b")
    sources = [source for source in models.sources if source.name in names]
    decode = dataclasses.replace(serve_config().decode, **room)
    with pytest.raises(ConfigError, match=message):
        Orchestrator(serve_config(decode=decode), models.base_source, sources)
