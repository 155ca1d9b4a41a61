"""Checks of what a cluster is told; a launcher makes them, which has no need of JAX."""

from __future__ import annotations

import math

from pshare_jax.config import ServeConfig
from pshare_jax.errors import ConfigError


def check_cluster(config: ServeConfig) -> None:
    """Checks what a cluster is told.

    Raises:
        ConfigError: names the key.
    """
    cluster = config.cluster
    for name in ("beat_seconds", "lost_seconds", "patience_seconds"):
        value = getattr(cluster, name)
        if not 0 < value < math.inf:
            raise ConfigError(f"cluster.{name}: must be a positive number of seconds, is {value}")
    if cluster.lost_seconds < 2 * cluster.beat_seconds:
        raise ConfigError(
            f"cluster.lost_seconds: must be at least two beats of {cluster.beat_seconds} s, is "
            f"{cluster.lost_seconds}"
        )
    if config.router.roles == "flexible":
        raise ConfigError(
            "router.roles: `flexible` is for meshes of one process; a worker in its own process "
            "covers prompts or generates"
        )
    if cluster.transport == "jax-transfer" and cluster.tls_cert:
        raise ConfigError(
            "cluster.transport: `jax-transfer` knows no TLS, but cluster.tls_cert is set; use "
            "`auto`"
        )
    if cluster.max_attempts < 1 or cluster.frontends < 1:
        raise ConfigError("cluster: max_attempts and frontends must be at least 1")
    if cluster.cpus and cluster.launcher in ("ray", "kubernetes"):
        raise ConfigError(
            f"cluster.cpus: is for the local launcher; with `{cluster.launcher}` it is said there "
            "which CPUs a worker gets"
        )
