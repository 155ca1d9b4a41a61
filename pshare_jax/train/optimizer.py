"""AdamW over the decode module's own parameters (Loshchilov and Hutter, arXiv 1711.05101)."""

from __future__ import annotations

import functools
import math

import optax

from pshare_jax.errors import ConfigError
from pshare_jax.models.weights import Weights
from pshare_jax.train.config import OptimizerConfig
from pshare_jax.train.hooks import load_hook


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The rate of each step of a run of `steps`: linear warm-up, then the schedule.

    The first step has a rate above zero already, and the last one too.
    """
    peak = config.learning_rate
    warmup = math.ceil(config.warmup * steps)
    rest = max(steps - warmup, 1)
    after = {
        "cosine": optax.schedules.cosine_decay_schedule(peak, rest),
        "linear": optax.schedules.linear_schedule(peak, 0.0, rest),
        "constant": optax.schedules.constant_schedule(peak),
    }[config.schedule]
    if not warmup:
        return after
    first = peak / warmup
    rising = optax.schedules.linear_schedule(first, peak, max(warmup - 1, 1))
    return optax.schedules.join_schedules([rising, after], [warmup])


def decays(weights: Weights) -> dict[str, bool]:
    """Which weights decay: matrices do, norm scales and biases do not."""
    return {name: not name.endswith((".scale", ".bias")) for name in weights}


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW with the schedule of a run of `steps` and, if asked for, clipping by global norm; or
    what `config.factory` makes of the configuration and the schedule.

    Raises:
        ConfigError: the factory cannot be used, or does not give an optimizer.
    """
    if config.factory:
        made = load_hook(config.factory, "optimizer.factory")(config, learning_rate(config, steps))
        if not isinstance(made, optax.GradientTransformation):
            raise ConfigError(
                f"optimizer.factory: {config.factory} gave a {type(made).__name__}, not an optax "
                "gradient transformation"
            )
        return made
    return _adamw(config, steps)


@functools.lru_cache(maxsize=4)
def _adamw(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Kept, so that a run like an earlier one of this process compiles no update."""
    adamw = optax.adamw(
        learning_rate(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decays,
    )
    if not config.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
