"""Meshes of several processes: what these must agree on, and how their worlds are joined."""

from __future__ import annotations

import hashlib
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import msgspec

from pshare_jax.cluster.worker import DecodeWorker, PrefillWorker
from pshare_jax.config import Role, ServeConfig
from pshare_jax.engine.numerics import code_digest
from pshare_jax.errors import ConfigError, GangLostError
from pshare_jax.runtime.mirror import Mirror, Replay, Run

logger = logging.getLogger(__name__)

NOT_SHARED = ("cluster", "server", "kv_store", "base", "compilation_cache_dir")
"""Parts of a configuration in which the processes of a gang may differ."""


def hosts_of(config: ServeConfig, role: Role) -> int:
    """Processes of a worker's mesh.

    Raises:
        ConfigError: they cannot have a mesh together, or are to do what several cannot.
    """
    if role == "both" and config.prefill.hosts != config.decode.hosts:
        raise ConfigError(
            f"prefill.hosts is {config.prefill.hosts} and decode.hosts {config.decode.hosts}: a "
            "worker that does both has one mesh"
        )
    side = "prefill" if role == "prefill" else "decode"
    hosts, degree = getattr(config, side).hosts, getattr(config, side).tensor_parallel
    if hosts < 1 or degree % hosts:
        raise ConfigError(
            f"{side}.hosts: {hosts} hosts cannot have equal parts of {side}.tensor_parallel, "
            f"{degree} devices"
        )
    if hosts == 1:
        return 1
    refused = {
        "kv_store.path": role != "decode" and config.kv_store.path,
        "decode.max_loras": role != "prefill" and config.decode.max_loras,
        "decode.max_full": role != "prefill" and config.decode.max_full,
    }
    if wrong := [key for key, value in refused.items() if value]:
        what = (
            "keeps no pages beyond its pool"
            if wrong[0] == "kv_store.path"
            else ("loads no modules while it runs")
        )
        raise ConfigError(f"{wrong[0]}: a mesh of several hosts ({side}.hosts: {hosts}) {what}")
    return hosts


def facts(config: ServeConfig, role: Role, name: str) -> dict[str, str]:
    """What the processes of a gang must have in common, by name."""
    shared = {
        key: value for key, value in msgspec.to_builtins(config).items() if key not in NOT_SHARED
    }
    text = msgspec.json.encode(shared, order="deterministic")
    return {
        "role": role,
        "name": name,
        "configuration": hashlib.blake2b(text, digest_size=8).hexdigest(),
        "jax": f"{version('jax')}, jaxlib {version('jaxlib')}",
        "code": code_digest(Path(__file__).parents[1]),
    }


def free_coordinator(host: str) -> str:
    """An address on a host of ours at which nobody listens."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as sock:
        port = sock.getsockname()[1]
    return f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"


def join_worlds(coordinator: str, rank: int, size: int) -> None:
    """Makes the devices of all processes one world; before anything else uses JAX.

    Args:
        coordinator: an address of the process of rank 0, the same for all.
        rank: of this process.
        size: number of processes.

    Raises:
        GangLostError: they do not meet.
    """
    # It would take SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            size,
            rank,
            coordinator_bind_address=coordinator if rank == 0 else None,
            # All is known: Kubernetes and others need not be asked.
            cluster_detection_method="deactivate",
        )
    except (RuntimeError, ValueError) as error:
        raise GangLostError(f"the gang does not meet at {coordinator}: {error}") from error


def mirror_of(
    prefill: Sequence[PrefillWorker[Any]],
    decode: Sequence[DecodeWorker[Any]],
    send: Callable[[Run], None],
    compiled: Callable[[], None],
) -> Mirror:
    """Has other processes of these workers' mesh told of each call before it is made.

    Args:
        prefill: all that cover prompts.
        decode: all that generate.
        send: tells the others, in order.
        compiled: waits until they have compiled what they were told to.
    """
    programs = (*decode, *prefill)[0].executor.programs
    mirror = Mirror(programs, _named_weights(prefill, decode), send, compiled)
    programs.wrap(mirror.wrap)
    return mirror


def replay_of(prefill: Sequence[PrefillWorker[Any]], decode: Sequence[DecodeWorker[Any]]) -> Replay:
    """What makes the calls of the mesh's first process with what these workers have."""
    executor = (*decode, *prefill)[0].executor
    history = decode[0].executor.history if decode else None
    weights = _named_weights(prefill, decode)
    return Replay(executor.programs, executor.pool, weights, history)


def _named_weights(
    prefill: Sequence[PrefillWorker[Any]], decode: Sequence[DecodeWorker[Any]]
) -> Mapping[str, Any]:
    """All that programs of these workers are given as weights, by names that all processes of a
    gang give it."""
    named: dict[str, Any] = {}
    for worker in prefill:
        for name, weights in worker.executor.weights.items():
            named[f"prefill/{name}"] = weights
    for worker in decode:
        for name, group in worker.executor.groups.items():
            named[f"decode/{name}"] = group.weights
            if group.adapters is not None:
                named[f"adapters/{name}"] = group.adapters
    return named
