"""AdamW over the decode module's own parameters (Loshchilov and Hutter, arXiv 1711.05101)."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pshare_jax.errors import ConfigError
from pshare_jax.models.weights import Weights
from pshare_jax.train.config import OptimizerConfig
from pshare_jax.train.hooks import load_hook


def step_rates(config: OptimizerConfig, steps: int) -> np.ndarray:
    """The learning rates of a run of `steps`, `[steps]` float32: linear warm-up, then the schedule.

    The first step has a rate above zero already, and the last one too.
    """
    warmup = math.ceil(config.warmup * steps)
    rising = np.arange(1, warmup + 1) / max(warmup, 1)
    done = np.arange(steps - warmup) / max(steps - warmup, 1)
    after = {
        "cosine": (1 + np.cos(np.pi * done)) / 2,
        "linear": 1 - done,
        "constant": np.ones_like(done),
    }[config.schedule]
    return (config.learning_rate * np.concatenate([rising, after])).astype(np.float32)


def _schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Of a count of steps, as optax's are: the first rate before the run, the end after it."""
    end = config.learning_rate if config.schedule == "constant" else 0.0
    rates = np.append(step_rates(config, steps), np.float32(end))
    return lambda count: jnp.asarray(rates)[jnp.clip(jnp.asarray(count, jnp.int32), 0, steps)]


def decays(weights: Weights) -> dict[str, bool]:
    """Which weights decay: matrices do, norm scales and biases do not."""
    return {name: not name.endswith((".scale", ".bias")) for name in weights}


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """AdamW and, if asked for, clipping by global norm; or what `config.factory` makes of the
    configuration and the schedule of a run of `steps`.

    Returns:
        What takes the rate of a step as `update(..., rate=)`, see `step_rates`; one of the factory
        has it from its schedule, and ignores that.

    Raises:
        ConfigError: the factory cannot be used, or does not give an optimizer.
    """
    if config.factory:
        made = load_hook(config.factory, "optimizer.factory")(config, _schedule(config, steps))
        if not isinstance(made, optax.GradientTransformation):
            raise ConfigError(
                f"optimizer.factory: {config.factory} gave a {type(made).__name__}, not an optax "
                "gradient transformation"
            )
        return optax.with_extra_args_support(made)
    return _adamw(config.beta1, config.beta2, config.epsilon, config.weight_decay, config.clip_norm)


@functools.lru_cache(maxsize=4)
def _adamw(
    beta1: float, beta2: float, epsilon: float, weight_decay: float, clip_norm: float
) -> optax.GradientTransformationExtraArgs:
    """Kept, so that a run like an earlier one of this process compiles no update."""
    adamw = optax.chain(
        optax.scale_by_adam(beta1, beta2, epsilon),
        optax.add_decayed_weights(weight_decay, decays),
        _scale_by_rate(),
    )
    if not clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw)


def _scale_by_rate() -> optax.GradientTransformationExtraArgs:
    """Minus the rate that a step is told, times what it is given.

    As an argument: runs that differ in their schedules have the same program. The count of steps is
    that of `optax.adamw`, whose state earlier versions have saved.
    """

    def init(params: Any) -> Any:
        del params
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: Any, params: Any = None, *, rate: Any, **extra: Any
    ) -> tuple[Any, Any]:
        del params, extra
        scaled = jax.tree.map(lambda leaf: -rate * leaf, updates)
        return scaled, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]
