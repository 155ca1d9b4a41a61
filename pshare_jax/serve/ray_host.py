"""`--launcher=ray`: Ray places the processes of a cluster on its hosts.

Each process has an actor that starts it and tells of its end; a worker whose mesh has several hosts
has one on each, see `ray_group`. Actors are detached, and Ray does not restart them: the launcher
makes new ones, and one that is started again finds those that the former has left. Neither tokens
nor pages go through Ray, and processes go on without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from collections.abc import Collection, Sequence
from typing import Any

from pshare_jax.cluster.secret import is_loopback
from pshare_jax.config import ServeConfig
from pshare_jax.errors import ConfigError
from pshare_jax.extras import require
from pshare_jax.launch_config import RayResources
from pshare_jax.serve.gang_process import GangProcess
from pshare_jax.serve.launcher import Launcher, make_token
from pshare_jax.serve.ray_actor import Job, Keeper, run_folder
from pshare_jax.serve.ray_group import RayGroup, bundle_of
from pshare_jax.serve.ray_left import NAMESPACE, Actors, find
from pshare_jax.serve.ray_process import (
    ANSWER_SECONDS,
    RayProcess,
    end_actor,
    last_line,
    ray_errors,
)
from pshare_jax.serve.supervision import END_SECONDS, Process, Spec, StartError

log = logging.getLogger(__name__)

SAY_SECONDS = 15.0
"""Between two log lines about a process for which Ray has no place."""

GIVE_UP_SECONDS = 5.0
"""That an actor may take to end a process that it is starting, when that is not wanted any more."""

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
        if getattr(config, side).hosts > 1 and not bundle_of(getattr(cluster.ray, side)):
            raise ConfigError(
                f"cluster.ray.{side}: workers of several hosts must ask for something, such as "
                "cpus, by which Ray finds places for them"
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
        self._found = find(ray, self._config.name)

    def reserve(self, spec: Spec) -> str:
        """Nothing: where it will be is Ray's choice, see `Host.reserve`."""
        del spec
        return ""

    def start(self, spec: Spec, cancelled: threading.Event) -> Process:
        """Takes over a process that a former launcher has left, or has Ray place a new one."""
        jobs = self._jobs(spec)
        with self._lock:
            left = self._found.pop(spec.name, [])
        process = self._take_over(left, jobs)
        return process or self._start(spec, jobs, cancelled)

    def release(self, name: str) -> None:
        """Nothing is left of it, see `Host.release`."""

    def close(self) -> None:
        """Leaves Ray, which ends if it is our own."""
        self._ray.shutdown()

    def retire_others(self, names: Collection[str]) -> None:
        """Ends what a former launcher has left and this one does not have, each in good order."""
        with self._lock:
            others = {name: self._found.pop(name) for name in self._found.keys() - set(names)}
        for name, left in others.items():
            log.info("ending %s, which an earlier launcher has left", name)
            for one in left:
                threading.Thread(target=self._retire, args=(one,), daemon=True).start()

    def _jobs(self, spec: Spec) -> list[Job]:
        """What the actors of a process run, by rank: one, or one for each host of its mesh."""
        host, port = spec.listen
        flags = spec.command[1:]
        if spec.side != "frontend":
            host, flags = "", (*flags, f"--alone-seconds={ALONE_SECONDS:g}")
        job = Job(
            self._config.name,
            spec.name,
            flags,
            spec.more,
            (host, port),
            spec.ready,
            os.getcwd(),
            self._end_seconds,
        )
        if spec.hosts == 1:
            return [job]
        return [
            dataclasses.replace(
                job,
                name=f"{spec.name}.{rank}",
                flags=(*flags, f"--gang-rank={rank}"),
                meets=rank == 0,
            )
            for rank in range(spec.hosts)
        ]

    def _start(self, spec: Spec, jobs: Sequence[Job], cancelled: threading.Event) -> Process:
        """Has Ray place actors that start all of a process.

        Raises:
            StartError: one cannot be started, or is not wanted any more.
        """
        made = Actors(self._config.name, spec.name, secrets.token_hex(4), len(jobs) > 1)
        group = RayGroup(self._ray, made.group) if made.is_gang else None
        members: list[RayProcess] = []
        try:
            if group is not None:
                asked = getattr(self._config, spec.side)
                self._wait(group.place(self._config.strategy, asked, len(jobs)), spec, cancelled)
            more = spec.more
            for rank, job in enumerate(jobs):
                job = dataclasses.replace(job, more=more)
                actor = made.by_rank[rank] = self._new(spec, job, made.actor(rank), group, rank)
                answer = self._wait(actor.start.remote(), spec, cancelled)
                members.append(RayProcess(self._ray, actor, *answer))
                if job.meets:
                    meeting = self._ray.get(actor.meeting.remote(), timeout=ANSWER_SECONDS)
                    more = (*more, f"--gang-coordinator={meeting}")
        except (StartError, *ray_errors(self._ray)) as error:
            self._give_up(made)
            if group is not None:
                group.remove()
            if isinstance(error, StartError):
                raise
            raise StartError(last_line(error)) from error
        return self._whole(made, members)

    def _give_up(self, actors: Actors) -> None:
        """Ends actors with their processes, also those that are being started.

        One that has no place yet does not answer: it is not waited for long, and has no process.
        """
        with contextlib.suppress(*ray_errors(self._ray)):
            ends = [actor.end.remote() for actor in actors.by_rank.values()]
            self._ray.wait(ends, num_returns=len(ends), timeout=GIVE_UP_SECONDS)
        for actor in actors.by_rank.values():
            end_actor(self._ray, actor)

    def _new(self, spec: Spec, job: Job, name: str, group: RayGroup | None, rank: int) -> Any:
        asked: RayResources = getattr(self._config, spec.side)
        strategy = "SPREAD" if self._config.strategy == "spread" else "DEFAULT"
        return self._actor.options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            max_restarts=0,
            max_task_retries=0,
            num_cpus=asked.cpus,
            num_gpus=asked.gpus,
            resources=dict(asked.resources),
            scheduling_strategy=strategy if group is None else group.strategy(rank),
        ).remote(job)

    def _whole(self, actors: Actors, members: Sequence[RayProcess]) -> Process:
        """The process that members are together."""
        if not actors.is_gang:
            return members[0]
        return GangProcess(actors.process, members, RayGroup(self._ray, actors.group).remove)

    def _wait(self, answer: Any, spec: Spec, cancelled: threading.Event) -> Any:
        """The answer of an actor or a group that may have no place yet.

        Raises:
            StartError: it is not wanted any more.
        """
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

    def _take_over(self, left: Sequence[Actors], jobs: Sequence[Job]) -> Process | None:
        """A former launcher's process, if it runs and is what we would run; others are ended."""
        taken = None
        for actors in left:
            members = None if taken else self._members(actors, jobs)
            if members is None:
                self._retire(actors)
            else:
                taken = self._whole(actors, members)
                log.info("going on with %s at %s", actors.process, taken.address)
        return taken

    def _members(self, actors: Actors, jobs: Sequence[Job]) -> list[RayProcess] | None:
        """Its processes, if all of them run what we would run."""
        if actors.is_gang != (len(jobs) > 1) or actors.by_rank.keys() != set(range(len(jobs))):
            return None
        members: list[RayProcess] = []
        with contextlib.suppress(*ray_errors(self._ray)):
            for rank, job in enumerate(jobs):
                actor = actors.by_rank[rank]
                digest = self._ray.get(actor.digest.remote(), timeout=ANSWER_SECONDS)
                if digest == job.digest:
                    answer = self._ray.get(actor.start.remote(), timeout=ANSWER_SECONDS)
                    members.append(RayProcess(self._ray, actor, *answer))
        return members if len(members) == len(jobs) else None

    def _retire(self, actors: Actors) -> None:
        """Ends a process in good order: the first of a gang tells the others."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            waits: list[Any] = []
            with contextlib.suppress(*ray_errors(self._ray)):
                for actor in actors.by_rank.values():
                    actor.send.remote(int(number))
                    waits.append(actor.wait.remote())
                # Who does not answer any more has been waited for, too.
                done, _ = self._ray.wait(waits, num_returns=len(waits), timeout=self._end_seconds)
                if len(done) == len(waits):
                    break
        for actor in actors.by_rank.values():
            end_actor(self._ray, actor)
        if actors.is_gang:
            RayGroup(self._ray, actors.group).remove()


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
        raise ConfigError(f"cluster.ray_address: {what}: {last_line(error)}") from error
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
        "prefill": max(config.prefill.engines, scale.max_prefill, most) * config.prefill.hosts,
        "decode": max(config.decode.engines, scale.max_decode, most) * config.decode.hosts,
    }
    cpus, others = float(os.cpu_count() or 1), Counter[str]()
    wanted = 0.0
    for side, count in counts.items():
        asked: RayResources = getattr(cluster.ray, side)
        wanted += count * asked.cpus
        for name, amount in asked.resources.items():
            others[name] += math.ceil(count * amount)
    return {"num_cpus": math.ceil(max(cpus, wanted)), "resources": dict(others)}
