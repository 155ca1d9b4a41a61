"""`--launcher=ray`: Ray places the processes of a cluster on its hosts.

Each process has an actor that starts it and tells of its end. Actors are detached, and Ray does not
restart them: the launcher makes new ones, and one that is started again finds those that the former
has left. Neither tokens nor pages go through Ray, and processes go on without it.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import re
import secrets
import signal
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from pshare_jax.cluster.secret import is_loopback
from pshare_jax.config import ServeConfig
from pshare_jax.errors import ConfigError
from pshare_jax.extras import require
from pshare_jax.launch_config import RayResources
from pshare_jax.serve.launcher import Launcher, make_token
from pshare_jax.serve.ray_actor import Job, Keeper, run_folder
from pshare_jax.serve.supervision import END_SECONDS, LOST, Spec, StartError

log = logging.getLogger(__name__)

NAMESPACE = "pshare_jax"
"""Of the actors, in Ray."""

ANSWER_SECONDS = 10.0
"""That an actor which is there may take to answer."""

SAY_SECONDS = 15.0
"""Between two log lines about a process for which Ray has no place."""

ALONE_SECONDS = 600.0
"""After so long without a frontend a worker ends: one that nobody can reach any more."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

_OWN = {
    # Its processes listen on 127.0.0.1 only,
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # answer who knows the token only,
    "RAY_AUTH_MODE": "token",
    # and tell nobody.
    "RAY_USAGE_STATS_ENABLED": "0",
}


def ray_launcher(config: ServeConfig, args: Sequence[str]) -> Launcher:
    """A launcher whose processes Ray places.

    Raises:
        ConfigError: a Ray that cannot be used, or a configuration that it cannot carry out.
        MissingExtraError: `ray` is not installed.
    """
    require("ray", "--launcher=ray")
    cluster = config.cluster
    for side in ("prefill", "decode"):
        if getattr(config, side).hosts > 1:
            raise ConfigError(
                f"{side}.hosts: Ray places workers of one host each; start those of several with "
                "`--launcher=local`, or as a StatefulSet each on Kubernetes"
            )
    if not _NAME.fullmatch(cluster.ray.name):
        raise ConfigError(
            f"cluster.ray.name: {cluster.ray.name!r} must be letters, digits, '-' and '_'"
        )
    token_file = cluster.token_file
    if not token_file:
        if cluster.ray_address:
            raise ConfigError(
                "cluster.token_file: name a file with the secret of the cluster's processes; all "
                "hosts of Ray must have it"
            )
        token_file = make_token(_own_folder(config))
    host = RayHost(config, _connect(config))
    launcher = Launcher(config, args, host, token_file)
    host.retire_others([child.name for child in launcher.children])
    return launcher


class RayHost:
    """Has Ray run processes, see `supervision.Host`.

    Args:
        config: the serving configuration.
        ray: the module, which is connected.
    """

    def __init__(self, config: ServeConfig, ray: Any):
        self._ray = ray
        self._config = config.cluster.ray
        self._end_seconds = config.server.drain_seconds + END_SECONDS
        self._actor = ray.remote(Keeper)
        self._lock = threading.Lock()
        self._found = dict(self._find())

    def reserve(self, spec: Spec) -> str:
        """Nothing: where it will be is Ray's choice, see `Host.reserve`."""
        del spec
        return ""

    def start(self, spec: Spec, cancelled: threading.Event) -> RayProcess:
        """Takes over a process that a former launcher has left, or has Ray place a new one."""
        job = self._job(spec)
        with self._lock:
            left = self._found.pop(spec.name, None)
        if left is not None and (process := self._take_over(left, job)) is not None:
            return process
        try:
            actor = self._new(spec, job)
        except _errors(self._ray) as error:
            raise StartError(f"Ray cannot make an actor: {_short(error)}") from error
        try:
            address, pid = self._wait(actor.start.remote(), spec, cancelled)
        except _errors(self._ray) as error:
            self._kill(actor)
            raise StartError(_short(error)) from error
        return RayProcess(self._ray, actor, address, pid)

    def release(self, name: str) -> None:
        """Nothing is left of it, see `Host.release`."""

    def close(self) -> None:
        """Leaves Ray, which ends if it is our own."""
        self._ray.shutdown()

    def retire_others(self, names: Collection[str]) -> None:
        """Ends what a former launcher has left and this one does not have, each in good order."""
        with self._lock:
            others = {name: self._found.pop(name) for name in self._found.keys() - set(names)}
        for name, actor in others.items():
            log.info("ending %s, which an earlier launcher has left", name)
            threading.Thread(target=self._retire, args=(actor,), daemon=True).start()

    def _job(self, spec: Spec) -> Job:
        host, port = spec.listen
        flags = spec.command[1:]
        if spec.side != "frontend":
            host, flags = "", (*flags, f"--alone-seconds={ALONE_SECONDS:g}")
        return Job(
            self._config.name,
            spec.name,
            flags,
            spec.more,
            (host, port),
            spec.ready,
            os.getcwd(),
            self._end_seconds,
        )

    def _new(self, spec: Spec, job: Job) -> Any:
        asked: RayResources = getattr(self._config, spec.side)
        return self._actor.options(
            name=f"{self._config.name}/{spec.name}/{secrets.token_hex(4)}",
            namespace=NAMESPACE,
            lifetime="detached",
            max_restarts=0,
            max_task_retries=0,
            num_cpus=asked.cpus,
            num_gpus=asked.gpus,
            resources=dict(asked.resources),
            scheduling_strategy="SPREAD" if self._config.strategy == "spread" else "DEFAULT",
        ).remote(job)

    def _wait(self, answer: Any, spec: Spec, cancelled: threading.Event) -> tuple[str, int]:
        """The answer of an actor that may have no place yet."""
        asked = time.monotonic()
        while not cancelled.is_set():
            done, _ = self._ray.wait([answer], timeout=0.5)
            if done:
                return self._ray.get(answer)
            if time.monotonic() - asked > SAY_SECONDS:
                asked = time.monotonic()
                resources = getattr(self._config, spec.side)
                log.info("waiting for Ray to place %s, which asks for %s", spec.name, resources)
        raise StartError("it is not wanted any more")

    def _find(self) -> Iterator[tuple[str, Any]]:
        """Actors of a former launcher of the same name, by process."""
        for full in self._ray.util.list_named_actors():
            cluster, _, rest = full.rpartition("/")[0].rpartition("/")
            if cluster == self._config.name:
                # It may have ended since.
                with contextlib.suppress(ValueError):
                    yield rest, self._ray.get_actor(full, namespace=NAMESPACE)

    def _take_over(self, actor: Any, job: Job) -> RayProcess | None:
        """A former launcher's process, if it runs and is what we would run; else it is ended."""
        with contextlib.suppress(*_errors(self._ray)):
            digest = self._ray.get(actor.digest.remote(), timeout=ANSWER_SECONDS)
            if digest == job.digest:
                answer = self._ray.get(actor.start.remote(), timeout=ANSWER_SECONDS)
                log.info("going on with %s at %s", job.name, answer[0])
                return RayProcess(self._ray, actor, *answer)
        self._retire(actor)
        return None

    def _retire(self, actor: Any) -> None:
        with contextlib.suppress(*_errors(self._ray)):
            for number in (signal.SIGTERM, signal.SIGKILL):
                actor.send.remote(int(number))
                if self._ray.wait([actor.wait.remote()], timeout=self._end_seconds)[0]:
                    break
        self._kill(actor)

    def _kill(self, actor: Any) -> None:
        with contextlib.suppress(*_errors(self._ray)):
            self._ray.kill(actor)


class RayProcess:
    """A process that an actor keeps, see `supervision.Process`.

    Args:
        ray: the module.
        actor: a `Keeper`.
        address: where the process listens.
        pid: on its host.
    """

    def __init__(self, ray: Any, actor: Any, address: str, pid: int):
        self.address = address
        self.pid = pid
        self._ray = ray
        self._actor = actor

    def wait_until_ready(self) -> bool:
        """See `Process.wait_until_ready`."""
        try:
            return self._ray.get(self._actor.wait_until_ready.remote())
        except _errors(self._ray):
            return False

    def wait(self) -> int:
        """See `Process.wait`; its actor ends with it."""
        try:
            code = self._ray.get(self._actor.wait.remote())
        except _errors(self._ray) as error:
            log.warning(
                "the process at %s is not heard of any more: %s", self.address, _short(error)
            )
            code = LOST
        self._end_actor()
        return code

    def terminate(self) -> None:
        """See `Process.terminate`."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """See `Process.kill`; one whose actor does not answer is given up with it."""
        if not self._send(signal.SIGKILL):
            self._end_actor()

    def _send(self, number: int) -> bool:
        try:
            self._ray.get(self._actor.send.remote(int(number)), timeout=ANSWER_SECONDS)
        except _errors(self._ray):
            return False
        return True

    def _end_actor(self) -> None:
        with contextlib.suppress(*_errors(self._ray)):
            self._ray.kill(self._actor)


def _errors(ray: Any) -> tuple[type[Exception], ...]:
    """What calls of Ray raise when an actor, or Ray itself, is not there."""
    return (ray.exceptions.RayError, ConnectionError, ValueError)


def _short(error: Exception) -> str:
    """The last line of an error that has come from another process with its traceback."""
    return str(error).strip().rpartition("\n")[2]


def _own_folder(config: ServeConfig) -> Any:
    try:
        return run_folder(config.cluster.ray.name)
    except OSError as error:
        raise ConfigError(f"cluster.ray.name: {error}") from error


def _connect(config: ServeConfig) -> Any:
    """The module `ray`, connected to the Ray that is configured, or to one of our own.

    Raises:
        ConfigError: it cannot be reached or used.
    """
    address = config.cluster.ray_address
    options: dict[str, Any] = {"address": address, "namespace": NAMESPACE}
    if not address:
        for name, value in _OWN.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        options |= {
            "address": "local",
            "_node_ip_address": "127.0.0.1",
            "include_dashboard": False,
            **_own_resources(config),
        }
    ray = importlib.import_module("ray")
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        what = f"no Ray at {address!r}" if address else "a Ray of our own cannot be started"
        raise ConfigError(f"cluster.ray_address: {what}: {_short(error)}") from error
    _check_hosts(config, ray)
    return ray


def _check_hosts(config: ServeConfig, ray: Any) -> None:
    hosts = sum(node["Alive"] for node in ray.nodes())
    if hosts > 1 and is_loopback(config.server.host):
        ray.shutdown()
        raise ConfigError(
            f"server.host: {config.server.host} is reached from its own host only, and Ray has "
            f"{hosts} hosts to run frontends on; name one that others reach, such as 0.0.0.0"
        )
    asked = config.cluster.ray
    if ray.cluster_resources().get("GPU") and not (asked.prefill.gpus or asked.decode.gpus):
        log.warning(
            "Ray has GPUs, and workers will see none of them: set cluster.ray.prefill.gpus and "
            "cluster.ray.decode.gpus"
        )


def _own_resources(config: ServeConfig) -> dict[str, Any]:
    """What a Ray of our own says that this machine has: enough for all processes, as there is no
    other machine."""
    cluster, scale = config.cluster, config.cluster.autoscale
    most = scale.devices or 1
    counts = {
        "frontend": cluster.frontends,
        "prefill": max(config.prefill.engines, scale.max_prefill, most),
        "decode": max(config.decode.engines, scale.max_decode, most),
    }
    cpus, others = float(os.cpu_count() or 1), Counter[str]()
    wanted = 0.0
    for side, count in counts.items():
        asked: RayResources = getattr(cluster.ray, side)
        wanted += count * asked.cpus
        for name, amount in asked.resources.items():
            others[name] += math.ceil(count * amount)
    return {"num_cpus": math.ceil(max(cpus, wanted)), "resources": dict(others)}
