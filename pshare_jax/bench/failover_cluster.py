"""The cluster of `bench failover`: its processes, and which streams each decode worker has."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from prometheus_client.parser import text_string_to_metric_families

from pshare_jax.bench.agents_targets import exiting_on_sigterm
from pshare_jax.cluster.limits import check_cluster
from pshare_jax.config_files import load_serve_config
from pshare_jax.errors import BenchmarkError, ConfigError
from pshare_jax.serve.launcher import Launcher, make_token
from pshare_jax.serve.local_host import LocalHost

_HELD = ("vllm:num_requests_running", "vllm:num_requests_waiting")
_LOOK_SECONDS = 0.05


class Cluster:
    """One prefill and two decode workers and a frontend, as children of this process.

    Args:
        launcher: which has started them.
    """

    def __init__(self, launcher: Launcher):
        self._launcher = launcher
        self._decode = {w.name: w for w in launcher.workers if w.spec.side == "decode"}

    @property
    def url(self) -> str:
        """Of the frontend."""
        return self._launcher.urls[0]

    def kill(self, worker: str) -> int:
        """Kills a decode worker, and nobody else; the id of its process."""
        pid = self._decode[worker].pid
        assert pid is not None, f"{worker} does not run"
        os.kill(pid, signal.SIGKILL)
        return pid

    async def is_whole(self, http: aiohttp.ClientSession) -> bool:
        """Whether the frontend is linked to all workers; `http` is a session with its address."""
        async with http.get("/health") as response:
            return (await response.json())["status"] == "ok"

    async def is_back(self, http: aiohttp.ClientSession, worker: str, killed: int) -> bool:
        """Whether another process than `killed` is in its place, and linked to the frontend."""
        child = self._decode[worker]
        if child.pid in (None, killed) or not child.is_ready.is_set():
            return False
        return await self.is_whole(http)

    async def held(self, http: aiohttp.ClientSession) -> dict[str, dict[str, int]]:
        """Sequences of each model by decode worker, as each of these says itself."""
        return {
            name: held_by_model(await _text(http, f"http://{worker.address}/metrics"))
            for name, worker in self._decode.items()
        }


async def _text(http: aiohttp.ClientSession, url: str) -> str:
    async with http.get(url) as response:
        response.raise_for_status()
        return await response.text()


def held_by_model(metrics: str) -> dict[str, int]:
    """Sequences by model that run or wait, of a worker's `/metrics`; only models that have any."""
    held: dict[str, int] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name in _HELD and sample.value:
                model = sample.labels["model_name"]
                held[model] = held.get(model, 0) + int(sample.value)
    return held


def placed(held: Mapping[str, Mapping[str, int]], models: Sequence[str]) -> dict[str, str]:
    """The worker of each model that has exactly one sequence, and has it on one worker.

    Args:
        held: sequences by worker and model.
        models: to be placed.
    """
    found = {model: [w for w in held if held[w].get(model)] for model in models}
    return {
        model: workers[0]
        for model, workers in found.items()
        if len(workers) == 1 and held[workers[0]][model] == 1
    }


@contextmanager
def running_cluster(config: Path, flags: Sequence[str], ready_seconds: float) -> Iterator[Cluster]:
    """Starts the cluster on free ports of 127.0.0.1, and ends all of it with the block.

    Args:
        config: a file of `settings_of`.
        flags: further ones of the servers.
        ready_seconds: after which it is given up.

    Raises:
        BenchmarkError: a process ended, or not all were ready in time.
        ConfigError: the configuration cannot be served by a cluster.
    """
    args = [f"--config={config}", *flags, "--server.host=127.0.0.1", "--server.port=0"]
    serve = load_serve_config(config, *args[1:])
    check_cluster(serve)
    with (
        exiting_on_sigterm(),
        tempfile.TemporaryDirectory(prefix="pshare-bench-failover-") as folder,
    ):
        launcher = Launcher(serve, args, LocalHost(serve.server), make_token(Path(folder)))
        try:
            launcher.start()
            _wait_until_ready(launcher, ready_seconds)
            yield Cluster(launcher)
        finally:
            launcher.stop()


def _wait_until_ready(launcher: Launcher, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not launcher.is_ready:
        if failed := launcher.failed:
            raise BenchmarkError(f"{failed} cannot run; what it says of that is above")
        if time.monotonic() > end:
            waiting = ", ".join(c.name for c in launcher.children if not c.is_ready.is_set())
            raise BenchmarkError(f"not ready after {seconds:.0f} s: {waiting}")
        time.sleep(_LOOK_SECONDS)
    launcher.announced()


def settings_of(config: Path, streams: int) -> dict[str, Any]:
    """A configuration's settings, for a cluster with a model for each stream.

    A model of its own is what tells at a worker whose sequence it has. The configuration's models
    are listed again under further names until there are as many; they have the same weights.

    Args:
        config: its file.
        streams: how many models there are to be.

    Raises:
        ConfigError: the file is not there, or names no model.
    """
    if not config.is_file():
        raise ConfigError(f"config: there is no configuration file {config}")
    settings = yaml.safe_load(config.read_text()) or {}
    models = settings.get("models")
    if not models:
        raise ConfigError(f"{config}: names no models")
    named = [
        {**models[i % len(models)], "name": _name(models[i % len(models)]["name"], i, len(models))}
        for i in range(streams)
    ]
    settings["models"] = named
    settings["prefill"] = {**settings.get("prefill", {}), "engines": 1}
    settings["decode"] = {**settings.get("decode", {}), "engines": 2}
    settings["cluster"] = {**settings.get("cluster", {}), "launcher": "local", "frontends": 1}
    return settings


def _name(name: str, index: int, count: int) -> str:
    again = index // count
    return f"{name}-again{again}" if again else name
