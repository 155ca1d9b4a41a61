"""How many workers a launcher runs: what the configuration allows, and what the load asks for."""

from __future__ import annotations

from collections.abc import Sequence

from pshare_jax.config import ServeConfig
from pshare_jax.core.autoscale import Autoscaler, Policy, Split
from pshare_jax.core.load import Load, Observer
from pshare_jax.errors import ConfigError


def check_autoscale(config: ServeConfig) -> None:
    """Checks what is said of autoscaling.

    Raises:
        ConfigError: names the key.
    """
    scale = config.cluster.autoscale
    if not scale.is_on:
        return
    for side, count in (("prefill", config.prefill.engines), ("decode", config.decode.engines)):
        least, most = _bounds(config, side)
        if not 1 <= least <= count <= most:
            raise ConfigError(
                f"cluster.autoscale: {side}.engines, with which it begins, is {count}; it must be "
                f"within min_{side}, at least 1, and max_{side}: {least} .. {most}"
            )
    if scale.devices and scale.devices != config.prefill.engines + config.decode.engines:
        raise ConfigError(
            f"cluster.autoscale.devices: {scale.devices} workers are to change sides, but "
            f"prefill.engines and decode.engines are {config.prefill.engines} and "
            f"{config.decode.engines}"
        )
    for name in ("observe_seconds", "window", "long_window", "target"):
        if not getattr(scale, name) > 0:
            raise ConfigError(f"cluster.autoscale.{name}: must be more than 0")
    pinned = [entry.name for entry in config.models if entry.decode_engines]
    if pinned:
        raise ConfigError(
            f"models.{pinned[0]}.decode_engines: with cluster.autoscale every decode worker hosts "
            "every model"
        )


def policy_of(config: ServeConfig) -> Policy:
    """The policy that the configuration asks for."""
    scale = config.cluster.autoscale
    (least_p, most_p), (least_d, most_d) = (_bounds(config, side) for side in ("prefill", "decode"))
    return Policy(
        devices=scale.devices,
        least=Split(least_p, least_d),
        most=Split(most_p, most_d),
        target=scale.target,
        window=scale.window,
        long_window=scale.long_window,
        rise_seconds=scale.rise_seconds,
        fall_seconds=scale.fall_seconds,
        settle_seconds=scale.settle_seconds,
    )


class Scaling:
    """Says when there should be other workers. Knows no clock and asks nobody.

    Args:
        config: the serving configuration, which `check_autoscale` has accepted.

    Attributes:
        split: workers of each side.
    """

    def __init__(self, config: ServeConfig):
        self._policy = policy_of(config)
        scale = config.cluster.autoscale
        self.split = Split(config.prefill.engines, config.decode.engines)
        self._observer = Observer(
            scale.prefill_tokens_per_s, scale.decode_sequences or config.decode.max_num_seqs
        )
        self._scaler: Autoscaler | None = None

    def observe(self, now: float, loads: Sequence[Load | None]) -> Split | None:
        """What there should be from now on, if that is something else.

        Args:
            now: seconds, from any start.
            loads: of all frontends; None of one that does not say: then nothing is decided.
        """
        known = [load for load in loads if load is not None]
        if not known or len(known) < len(loads):
            return None
        seen = self._observer.observe(now, known)
        if seen is None:
            return None
        observation, capacity = seen
        if self._scaler is None:
            self._scaler = Autoscaler(capacity, self._policy, self.split)
        self._scaler.capacity = capacity
        changed = self._scaler.observe(observation)
        if changed is not None:
            self.split = changed
        return changed

    def have(self, split: Split) -> None:
        """There are so many workers: fewer than there should be, where one cannot run."""
        self.split = split
        if self._scaler is not None:
            self._scaler.split = split


def _bounds(config: ServeConfig, side: str) -> tuple[int, int]:
    """Fewest and most workers of a side; those that there are where it is not to change."""
    scale = config.cluster.autoscale
    most = getattr(scale, f"max_{side}")
    if most:
        return getattr(scale, f"min_{side}"), most
    if scale.devices:
        return getattr(scale, f"min_{side}"), scale.devices - 1
    count = getattr(config, side).engines
    return count, count
