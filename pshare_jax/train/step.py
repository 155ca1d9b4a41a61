"""The compiled computations of training, on one mesh."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from pshare_jax.models.weights import Weights, WeightSpec, weight_specs
from pshare_jax.sharding.rules import replicated, sharding_for, weight_shardings
from pshare_jax.train.layout import Batch
from pshare_jax.train.loss import Recipe, base_kv, loss_sum

KV_AXES = ("batch", None, None, None, "kv_heads", "head_dim")


class Gradients(NamedTuple):
    """Sums over target tokens: of the loss in nats and of its gradient, and their number."""

    loss: Any
    tokens: Any
    weights: Any


class Update(NamedTuple):
    """Mean loss in nats a target token, number of target tokens, global norm of the gradient."""

    loss: Any
    tokens: Any
    norm: Any


class Computations:
    """Everything that training runs on devices; each method is compiled once for each shape.

    Gradients of micro-batches are added up as sums over tokens and divided once, so that however a
    batch is cut, every target token counts the same.

    Args:
        recipe: what the loss depends on.
        optimizer: see `optimizer.make_optimizer`.
        mesh: has the axes `data`, `fsdp` and `tensor`.
        specs: the trainable weights.
    """

    def __init__(
        self,
        recipe: Recipe,
        optimizer: optax.GradientTransformationExtraArgs,
        mesh: Mesh,
        specs: Mapping[str, WeightSpec],
    ):
        self.recipe = recipe
        self.mesh = mesh
        self.trainable_shardings = weight_shardings(mesh, specs)
        self.base_shardings = weight_shardings(mesh, weight_specs(recipe.config))
        self.scalar_sharding = replicated(mesh)
        weights = tuple(specs.items())
        of_recipe = _of_recipe(recipe, mesh, weights)
        self._gradients = of_recipe.gradients
        self._add = of_recipe.add
        self._loss = of_recipe.loss
        self._base_kv = of_recipe.base_kv
        self._replicate = of_recipe.replicate
        of_optimizer = _of_optimizer(optimizer, mesh, weights)
        self.state_shardings = of_optimizer.state_shardings
        self._init = of_optimizer.init
        self._update = of_optimizer.update
        self.jitted = {
            "base_kv": self._base_kv,
            "gradients": self._gradients,
            "update": self._update,
        }
        """The computations of a training step under jit, for compiling them without running."""

    def init_optimizer(self, trainable: Weights) -> Any:
        """The optimizer's state at step 0: moments of `trainable` and of nothing else."""
        return self._init(trainable)

    def put(self, batch: Batch) -> dict[str, jax.Array]:
        """A batch on the mesh, its rows split over `data` and `fsdp`."""
        return {name: self._put(name, array) for name, array in batch.items()}

    def batch_sharding(self, name: str, shape: tuple[int, ...]) -> NamedSharding:
        """How the array `name` of a batch lies on the mesh."""
        axes = KV_AXES if name == "kv" else ("batch", *(None,) * (len(shape) - 1))
        return sharding_for(self.mesh, shape, axes)

    def _put(self, name: str, array: np.ndarray) -> jax.Array:
        sharding = self.batch_sharding(name, array.shape)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def base_kv(self, base: Weights, prompt: jax.Array) -> jax.Array:
        """See `loss.base_kv`."""
        return self._base_kv(base, prompt)

    def gradients(
        self,
        trainable: Weights,
        frozen: Mapping[str, Weights],
        kv: jax.Array | None,
        batch: Mapping[str, jax.Array],
    ) -> Gradients:
        """Loss and gradient sums of one micro-batch; see `loss.loss_sum`."""
        return self._gradients(trainable, frozen, kv, batch)

    def add(self, total: Gradients, more: Gradients) -> Gradients:
        """Their sum; `total` is donated."""
        return self._add(total, more)

    def update(
        self, trainable: Weights, state: Any, gradients: Gradients, rate: np.float32
    ) -> tuple[Weights, Any, Update]:
        """One optimizer step at the learning rate `rate`; weights and state are donated."""
        return self._update(trainable, state, gradients, rate)

    def loss(
        self,
        trainable: Weights,
        frozen: Mapping[str, Weights],
        kv: jax.Array | None,
        batch: Mapping[str, jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        """Loss sum in nats and number of target tokens of one micro-batch, without a gradient."""
        return self._loss(trainable, frozen, kv, batch)

    def to_host(self, array: jax.Array) -> np.ndarray:
        """The whole of an array, in every process."""
        return np.asarray(self._replicate(array))


Specs = tuple[tuple[str, WeightSpec], ...]
"""Of the trainable weights, by name."""


class _OfRecipe(NamedTuple):
    """What depends on no optimizer, under jit; see `Computations`."""

    gradients: Any
    add: Any
    loss: Any
    base_kv: Any
    replicate: Any


@functools.lru_cache(maxsize=4)
def _of_recipe(recipe: Recipe, mesh: Mesh, specs: Specs) -> _OfRecipe:
    """Kept: runs of one process that differ in data, rates or length compile this once."""
    scalar = replicated(mesh)
    gradients = Gradients(scalar, scalar, weight_shardings(mesh, dict(specs)))
    return _OfRecipe(
        gradients=jax.jit(functools.partial(_gradients, recipe), out_shardings=gradients),
        add=jax.jit(_add, donate_argnums=0, out_shardings=gradients),
        loss=jax.jit(functools.partial(_loss, recipe), out_shardings=(scalar, scalar)),
        base_kv=jax.jit(functools.partial(base_kv, recipe)),
        replicate=jax.jit(lambda x: x, out_shardings=scalar),
    )


class _OfOptimizer(NamedTuple):
    """What depends on the optimizer, under jit, and how its state lies on the mesh."""

    state_shardings: Any
    init: Any
    update: Any


@functools.lru_cache(maxsize=4)
def _of_optimizer(
    optimizer: optax.GradientTransformationExtraArgs, mesh: Mesh, specs: Specs
) -> _OfOptimizer:
    scalar, trainable = replicated(mesh), weight_shardings(mesh, dict(specs))
    abstract = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in specs}
    state = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, abstract),
        trainable,
        transform_non_params=lambda _: scalar,
    )
    return _OfOptimizer(
        state,
        init=jax.jit(optimizer.init, out_shardings=state),
        update=jax.jit(
            functools.partial(_update, optimizer),
            donate_argnums=(0, 1),
            out_shardings=(trainable, state, Update(scalar, scalar, scalar)),
        ),
    )


def _gradients(
    recipe: Recipe,
    trainable: Weights,
    frozen: Mapping[str, Weights],
    kv: jax.Array | None,
    batch: Mapping[str, jax.Array],
) -> Gradients:
    loss, weights = jax.value_and_grad(
        lambda trained: loss_sum(recipe, trained, frozen, kv, batch)
    )(trainable)
    return Gradients(loss, jnp.sum(batch["weights"]), weights)


def _add(total: Gradients, more: Gradients) -> Gradients:
    return jax.tree.map(jnp.add, total, more)


def _update(
    optimizer: optax.GradientTransformationExtraArgs,
    trainable: Weights,
    state: Any,
    total: Gradients,
    rate: jax.Array,
) -> tuple[Weights, Any, Update]:
    # A product, since XLA would write the quotients to memory before it uses them.
    share = 1 / total.tokens
    gradients = {name: weight * share for name, weight in total.weights.items()}
    updates, state = optimizer.update(gradients, state, trainable, rate=rate)
    metrics = Update(total.loss / total.tokens, total.tokens, share * _norm(total.weights))
    return optax.apply_updates(trainable, updates), state, metrics  # type: ignore[return-value]


def _norm(weights: Weights) -> jax.Array:
    """Global norm, as products: XLA on CPUs would write the squares of a sum to memory."""
    squares = [jnp.tensordot(w, w, w.ndim, precision="highest") for w in weights.values()]
    return jnp.sqrt(sum(squares, start=jnp.float32(0)))


def _loss(
    recipe: Recipe,
    trainable: Weights,
    frozen: Mapping[str, Weights],
    kv: jax.Array | None,
    batch: Mapping[str, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    return loss_sum(recipe, trainable, frozen, kv, batch), jnp.sum(batch["weights"])
