"""The soak test itself: that it finds what grows and what is wrong, and nothing else."""

import asyncio
import json
import os
import time
from dataclasses import replace
from unittest import mock

import aiohttp
import pytest

from pshare_jax.bench import soak, soak_load
from pshare_jax.bench.__main__ import main
from pshare_jax.bench.soak_options import SoakOptions
from pshare_jax.bench.soak_watch import Sample, judge, quantile
from pshare_jax.errors import BenchmarkError, ConfigError
from tests.serve.conftest import tokenizer, tokenizer_folder  # noqa: F401 (fixtures)
from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import running_server

IDLE = Sample(0, 500, 20, 30, 0, 0, 0, {0.05: 10, 5.0: 10}, {0.05: 10, 5.0: 10})


def under_load(count: int = 9, growth: float = 0.0) -> list[Sample]:
    lags = {0.005: 0.0, 0.05: 0.0, 5.0: 0.0}
    return [
        replace(
            IDLE,
            seconds=i,
            rss_mib=600 + growth * i,
            files=25,
            pages_used=7,
            running=3,
            lags=dict.fromkeys(lags, 100.0 * i),
            own_lags={0.005: 50.0 * i, 0.05: 99.0 * i, 5.0: 100.0 * i},
        )
        for i in range(count)
    ]


def failed(*, before=IDLE, samples=None, after=IDLE, compared=5, faults=()) -> list[str]:
    verdicts = judge(before, samples or under_load(), after, compared, faults)
    return [name for name, verdict in verdicts.items() if not verdict["kept"]]


def test_what_stays_as_it_is_is_kept():
    assert failed() == []
    assert failed(samples=under_load(growth=2)) == []


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"samples": under_load(growth=10)}, "memory"),
        ({"after": replace(IDLE, files=24)}, "open files"),
        ({"after": replace(IDLE, threads=31)}, "threads"),
        ({"after": replace(IDLE, pages_used=1)}, "pages held"),
        ({"after": replace(IDLE, compiles=1)}, "compilations"),
        ({"faults": ["one"]}, "answers"),
        ({"compared": 0}, "answers"),
        (
            {"samples": [replace(s, own_lags={0.05: 98.0 * s.seconds, 5.0: 100.0 * s.seconds})
                         for s in under_load()]},
            "event loop lag, its own work",
        ),
    ],
)  # fmt: skip
def test_what_grows_is_found(change, name):
    assert failed(**change) == [name]


def test_quantiles_are_those_of_the_time_between():
    before, after = {0.1: 100.0, 1.0: 100.0}, {0.1: 149.0, 1.0: 200.0}
    assert quantile(before, after, 0.49) == 0.1
    assert quantile(before, after, 0.5) == 1.0
    assert quantile(after, after, 0.99) == 0.0


def options(client, **changes) -> SoakOptions:
    defaults = {"minutes": 0.05, "probes": 6, "clients": 4, "longest_prompt": 20,
                "longest_answer": 8, "seconds_between_samples": 0.2}  # fmt: skip
    return SoakOptions(url=client.url, pid=os.getpid(), **{**defaults, **changes})


@pytest.fixture(scope="module")
def server(tokenizer):  # noqa: F811
    config = fake_config(max_model_len=2048, max_body_items=10_000)
    engine = fake_engine(tokenizer, config)
    # What a real pool has, the fake one does not count down.
    plain = engine.stats
    engine.stats = lambda: replace(plain(), pools={}, waiting={})
    # Files of a process that runs tests are not what is asked for.
    with mock.patch.object(soak, "_CLOSED_SECONDS", 0.01), running_server(engine) as client:
        yield client


def test_a_server_that_is_right(server):
    done = []
    result = soak.run(options(server), lambda *now: done.append(now))
    assert result["faults"] == []
    kept = {name: v["kept"] for name, v in result["verdicts"].items()}
    # Memory, files and threads are those of the tests' own process here.
    for name in ("answers", "pages held", "compilations"):
        assert kept[name], result["verdicts"][name]
    assert set(result["requests"]) <= set(soak_load._KINDS)
    assert sum(result["requests"]["probe"].values()) == result["requests"]["probe"]["equal"] > 0
    assert done[-1][1] == 3
    assert result["samples"]


def test_a_server_that_answers_otherwise_under_load(server, monkeypatch):
    plain = soak.Load.client

    async def client(self, number: int, end: float) -> None:
        server.engine.script = lambda request: [9, 8, 7]
        await plain(self, number, end)

    monkeypatch.setattr(soak.Load, "client", client)
    result = soak.run(options(server, minutes=0.01))
    assert not result["verdicts"]["answers"]["kept"]
    assert "instead of" in result["faults"][0]


class Session:
    """A server that takes modules at run time, as far as `hot_loads` sees of it."""

    def __init__(self, refused: str):
        self.calls: list[tuple[str, dict]] = []
        self._refused = refused

    def post(self, path: str, json: dict) -> "Session":
        self.calls.append((path, json))
        return self

    async def __aenter__(self) -> "Session":
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def raise_for_status(self) -> None:
        if self._refused in self.calls[-1][0]:
            raise aiohttp.ClientError("403")

    async def json(self) -> dict:
        return {"choices": [{"token_ids": [1]}]}


@pytest.mark.parametrize("refused", ["", "unload"])
async def test_modules_are_loaded_asked_and_unloaded(monkeypatch, refused):
    monkeypatch.setattr(soak_load, "_HOT_PAUSE_SECONDS", 0.001)
    session = Session(refused or "nothing")
    settings = SoakOptions(hot=["one", "two"])
    load = soak_load.Load(session, ["base"], [], settings)  # type: ignore[arg-type]
    await load.hot_loads(time.monotonic() + 0.01)
    paths = [path for path, _ in session.calls[:3]]
    assert paths == ["/v1/load_lora_adapter", "/v1/completions", "/v1/unload_lora_adapter"]
    assert session.calls[0][1] == {"lora_name": "soak-0", "lora_path": "one"}
    assert session.calls[1][1]["model"] == "soak-0"
    assert set(load.outcomes["hot"]) == {"failed" if refused else "loaded"}
    assert bool(load.faults) == bool(refused)


def test_what_cannot_be_asked_for():
    with pytest.raises(ConfigError, match="url and pid go together"):
        SoakOptions(url="http://x")
    with pytest.raises(ConfigError, match="must be positive"):
        SoakOptions(minutes=0)


def test_a_server_that_is_not_there():
    with pytest.raises(BenchmarkError, match=r"http://127.0.0.1:1: "):
        soak.run(SoakOptions(url="http://127.0.0.1:1", pid=1))


def test_the_command_exits_with_1_for_what_is_not_kept(server, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(soak.Load, "client", lambda self, number, end: asyncio.sleep(0))
    file = tmp_path / "soak.json"
    arguments = [f"--url={server.url}", f"--pid={os.getpid()}", "--minutes=0.001", "--probes=1"]
    # Nothing was compared.
    assert main(["soak", *arguments, f"--json={file}"]) == 1
    assert json.loads(file.read_text())["verdicts"]["answers"]["kept"] is False
    assert "0 compared" in capsys.readouterr().out
    assert main(["soak", "--minutes=0"]) == 2
