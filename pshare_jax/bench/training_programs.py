"""What `bench compile` compiles of training: the trainer's own computations, on abstract weights.

A training step is `gradients`, then `update`; `base KV` runs once for each row of the training set,
whose KV is kept on the host. Masters, moments and gradients are float32, the rest is bfloat16, and
activations are computed again in the backward pass (`remat`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pshare_jax.bench.accelerators import Accelerator
from pshare_jax.bench.compile_programs import DTYPE, Program, Sizes, abstract, bytes_per_device
from pshare_jax.core.split_rule import LAST_TOKEN
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.weights import LORA_TARGETS
from pshare_jax.sharding.rules import DATA, FSDP, TENSOR
from pshare_jax.train.buckets import choose_buckets
from pshare_jax.train.config import OptimizerConfig
from pshare_jax.train.data import Example, Turn
from pshare_jax.train.flops import row_flops
from pshare_jax.train.layout import Row, collate, make_row
from pshare_jax.train.loss import LoraShape, Recipe
from pshare_jax.train.optimizer import make_optimizer
from pshare_jax.train.step import Computations, Gradients
from pshare_jax.train.weights import trainable_specs

_LORA = LoraShape(rank=16, alpha=32.0, targets=LORA_TARGETS)
_O0 = 9  # of XLA's effort levels
_LEAST_EFFORT = {"optimization_level": _O0, "memory_fitting_level": _O0}
"""XLA for TPUs takes 20 times as long to compile a backward pass with its default effort."""
_STEPS = 1000  # of the learning rate's schedule; no shape depends on it


def training_mesh(accelerator: Accelerator, *, full: bool) -> Mesh:
    """All devices of a machine, divided over `data`, `fsdp` and `tensor`.

    A full module's masters, moments and gradients take 16 bytes a parameter, so they are split over
    every device; for LoRA two replicas have room. Tensor parallelism is over two devices where
    there are more than two.
    """
    devices = np.asarray(accelerator.devices())
    tensor = 2 if devices.size > 2 else 1
    data = 1 if full else 2
    return Mesh(devices.reshape(data, -1, tensor), (DATA, FSDP, TENSOR))


def training_programs(
    accelerator: Accelerator, config: ModelConfig, sizes: Sizes
) -> Iterator[Program]:
    """The training of a full and of a LoRA decode module, as the trainer jits it."""
    row = _row(sizes)
    for lora in (None, _LORA):
        mesh = training_mesh(accelerator, full=lora is None)
        options = _LEAST_EFFORT if accelerator.platform == "tpu" else {}
        yield from _Training(config, mesh, lora, row, sizes.train_batch, options).programs()


def _row(sizes: Sizes) -> Row:
    end = sizes.train_prompt + sizes.train_answer
    example = Example(np.zeros(end, np.int32), (Turn(sizes.train_prompt, end),), "")
    return make_row(example, LAST_TOKEN)


class _Training:
    """One kind of module on one mesh: its computations and the abstract arrays they take."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        lora: LoraShape | None,
        row: Row,
        batch_size: int,
        compiler_options: Mapping[str, float],
    ):
        self.compiler_options = compiler_options
        self.recipe = Recipe(config, DTYPE.__name__, lora, remat=True)
        self.mesh, self.row, self.batch_size = mesh, row, batch_size
        specs = trainable_specs(config, lora)
        optimizer = make_optimizer(OptimizerConfig(2e-5), _STEPS)
        self.compute = Computations(self.recipe, optimizer, mesh, specs)
        shardings = self.compute.trainable_shardings
        self.trainable = {
            name: abstract(spec.shape, jnp.float32, shardings[name]) for name, spec in specs.items()
        }
        self.state = jax.tree.map(
            lambda a, sharding: abstract(a.shape, a.dtype, sharding),
            jax.eval_shape(optimizer.init, self.trainable),
            self.compute.state_shardings,
        )
        self.base = {
            name: abstract(spec.shape, DTYPE, self.compute.base_shardings[name])
            for name, spec in trainable_specs(config, None).items()
        }
        self.frozen = {} if lora is None else {"base": self.base}
        [bucket], _ = choose_buckets([row], 1)
        batch = collate([row] * batch_size, bucket, batch_size, teacher=False)
        arrays = {name: self._on_mesh(name, array) for name, array in batch.items()}
        self.prompt = arrays.pop("prompt")
        self.batch = arrays
        kv = jax.eval_shape(self.compute.jitted["base_kv"], self.base, self.prompt)
        self.kv = self._on_mesh("kv", kv)

    def _on_mesh(self, name: str, array: Any) -> Any:
        sharding = self.compute.batch_sharding(name, array.shape)
        return abstract(array.shape, array.dtype, sharding)

    def programs(self) -> Iterator[Program]:
        """Base KV, gradients and update; each with what else lies in memory while it runs."""
        trained = bytes_per_device(self.trainable)
        moments = bytes_per_device(self.state)
        frozen = bytes_per_device(self.frozen)
        flops = row_flops(self.recipe, self.row, kv_kept=True)
        with_kv = row_flops(self.recipe, self.row, kv_kept=False)
        scalar = abstract((), jnp.float32, self.compute.scalar_sharding)
        gradients = Gradients(scalar, scalar, self.trainable)
        yield self._program(
            "base_kv", (self.base, self.prompt), self.kv, with_kv - flops, resident=trained
        )
        yield self._program(
            "gradients",
            (self.trainable, self.frozen, self.kv, self.batch),
            self.trainable,
            flops,
            resident=moments,
        )
        yield self._program(
            "update",
            (self.trainable, self.state, gradients, scalar),
            (self.trainable, self.state),
            0.0,
            resident=frozen,
        )

    def _program(
        self, name: str, arguments: tuple, results: Any, row_operations: float, resident: int
    ) -> Program:
        kind = "full" if self.recipe.lora is None else f"LoRA, rank {self.recipe.lora.rank}"
        return Program(
            f"{kind}: {name.replace('base_kv', 'base KV')}",
            self.compute.jitted[name],
            arguments,
            weight_bytes=bytes_per_device((self.trainable, self.state, self.frozen)),
            resident_bytes=resident,
            mesh=" x ".join(str(size) for size in self.mesh.shape.values()),
            least_bytes=bytes_per_device((arguments, results)),
            least_flops=row_operations * self.batch_size / self.mesh.size,
            compiler_options=self.compiler_options,
        )
