"""LoRA decode modules (Hu et al., arXiv 2106.09685), many of them in one batch.

The adapters of n modules are stacked along one axis. A row of the batch picks its adapter by index:
x is multiplied with the A factors of all modules at once, a one-hot row mask keeps the chosen
module's part, and the B factors of all modules map that back: two dense products whatever the mix.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pshare_jax.errors import CheckpointError
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.weights import LORA_TARGETS, Weights, lora_specs

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


class LoraModule(NamedTuple):
    """One module: factors as in `weights.lora_specs`; the update is `alpha / rank * a @ b`."""

    weights: Weights
    alpha: float
    rank: int
    targets: Sequence[str] = LORA_TARGETS


class Adapters:
    """Stacked adapters and the one each row uses. Lives for one trace.

    Args:
        weights: flat dict as made by `stack_adapters`: for each adapted projection
            `<path>.lora_a [*in, n, r]` and `<path>.lora_b [n, r, *out]`, scales folded into b.
        row_index: `[B]` int32, index of each row's adapter; -1 for none.
    """

    def __init__(self, weights: Weights, row_index: Int[Array, " B"]):
        self._weights = weights
        a = next((a for name, a in weights.items() if name.endswith(".lora_a")), None)
        one_hot = jax.nn.one_hot(row_index, 0 if a is None else a.shape[-2], dtype=jnp.float32)
        self._mask = one_hot[:, None, :, None]
        self._adapted = row_index >= 0

    def update(
        self, path: str, x: Float[Array, "B T *inputs"]
    ) -> Float[Array, "B T *outputs"] | None:
        """What the adapters add to projection `path`: `[B, T, *in]` -> `[B, T, *out]` float32.

        None when no adapter targets that projection.
        """
        a = self._weights.get(f"{path}.lora_a")
        if a is None:
            return None
        low = jnp.tensordot(x, a, axes=a.ndim - 2, preferred_element_type=jnp.float32)
        low = (low * self._mask).astype(x.dtype)
        b = self._weights[f"{path}.lora_b"]
        update = jnp.tensordot(low, b, axes=2, preferred_element_type=jnp.float32)
        # Zero times a factor that is not finite would be NaN: rows of the base see the base alone.
        adapted = self._adapted.reshape(-1, *[1] * (update.ndim - 1))
        return jnp.where(adapted, update, 0)


class OneAdapter(Adapters):
    """The adapters of one module, which all rows use: what training computes. Lives for one trace.

    Args:
        module: rank r.
        batch_size: rows.
    """

    def __init__(self, module: LoraModule, batch_size: int):
        super().__init__(stack_adapters([module]), jnp.zeros(batch_size, jnp.int32))

    def factors(self, path: str) -> tuple[jax.Array, jax.Array] | None:
        """Of projection `path`: a `[*in, r]` and b `[r, *out]`, `alpha / rank` folded into b."""
        a = self._weights.get(f"{path}.lora_a")
        return None if a is None else (a[..., 0, :], self._weights[f"{path}.lora_b"][0])


def check_lora(config: ModelConfig, module: LoraModule) -> None:
    """Checks a module's names and shapes against `config`.

    Raises:
        CheckpointError: names the first weight that is missing, unexpected or misshapen.
    """
    specs = lora_specs(config, module.rank, module.targets)
    for name, spec in specs.items():
        if name not in module.weights:
            raise CheckpointError(f"{name}: missing from a LoRA module of rank {module.rank}")
        if (shape := tuple(module.weights[name].shape)) != spec.shape:
            raise CheckpointError(
                f"{name}: shape {list(shape)}, but rank {module.rank} on this base needs "
                f"{list(spec.shape)}"
            )
    for name in module.weights:
        if name not in specs:
            raise CheckpointError(
                f"{name}: unexpected in a LoRA module with targets {', '.join(module.targets)}"
            )


def stack_adapters(modules: Sequence[LoraModule]) -> Weights:
    """Stacks modules of any ranks and targets for `Adapters`; module i gets index i.

    Ranks are zero-padded to the largest, missing targets are zeros, `alpha / rank` is folded into b
    (in float32, then back to the factor's dtype).
    """
    rank = max(module.rank for module in modules)
    names = sorted({name for module in modules for name in module.weights})
    scales = [np.float32(module.alpha / module.rank) for module in modules]
    return {
        name: _stack(
            [module.weights.get(name) for module in modules],
            scales,
            rank=rank,
            is_a=name.endswith(".lora_a"),
        )
        for name in names
    }


# One program a shape: each operation for itself would be compiled for itself.
@functools.partial(jax.jit, static_argnames=("rank", "is_a"))
def _stack(
    factors: Sequence[jax.Array | None], scales: Sequence[jax.Array], *, rank: int, is_a: bool
) -> jax.Array:
    rank_axis = -1 if is_a else 0
    template = next(factor for factor in factors if factor is not None)
    shape = list(template.shape)
    shape[rank_axis] = rank
    parts = []
    for factor, scale in zip(factors, scales, strict=True):
        if factor is None:
            parts.append(jnp.zeros(shape, template.dtype))
            continue
        if not is_a:
            factor = (jnp.asarray(factor, jnp.float32) * scale).astype(template.dtype)
        padding = [(0, 0)] * factor.ndim
        padding[rank_axis] = (0, rank - factor.shape[rank_axis])
        parts.append(jnp.pad(factor, padding))
    return jnp.stack(parts, axis=-2 if is_a else 0)


def merge(base: Weights, module: LoraModule) -> Weights:
    """The full weights that `base` plus the module's updates amount to; `base` is not modified.

    Raises:
        ValueError: kernels of 8 bits, to which nothing can be added.
    """
    merged = dict(base)
    for name, a in module.weights.items():
        path, _, factor = name.rpartition(".")
        if factor != "lora_a":
            continue
        kernel = merged[f"{path}.kernel"]
        if kernel.dtype.itemsize == 1:
            raise ValueError(f"{path}.kernel: has 8 bits; merge before it is quantised")
        scale = np.float32(module.alpha / module.rank)
        merged[f"{path}.kernel"] = _merged(kernel, a, module.weights[f"{path}.lora_b"], scale)
    return merged


@jax.jit
def _merged(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    update = jnp.tensordot(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), axes=1)
    return (jnp.asarray(kernel, jnp.float32) + scale * update).astype(kernel.dtype)
