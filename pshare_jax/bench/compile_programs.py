"""What `bench compile` compiles of serving: the programs of `runtime`, on abstract weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from pshare_jax.bench.accelerators import Accelerator
from pshare_jax.config import DecodeConfig
from pshare_jax.core.buckets import TRANSFER_BUCKETS
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.weights import lora_specs, lora_targets, used_parameters, weight_specs
from pshare_jax.runtime.layout import PageLayout
from pshare_jax.runtime.programs import Call, Programs, Slot
from pshare_jax.runtime.steps import DecodeInput, StepSpec
from pshare_jax.sharding.mesh import carve, carve_one
from pshare_jax.sharding.rules import TENSOR, weight_shardings

DTYPE = jnp.bfloat16


@dataclass(frozen=True)
class Sizes:
    """Sizes of the compiled steps.

    Args:
        batch: rows of the decode step.
        context: positions that each row's page table holds.
        chunk: tokens of the prefill chunk.
        page_size: token slots of a page.
        lora_modules: modules that are stacked where prefill and decode share one chip.
        lora_rank: their rank, over all projections.
        train_batch: rows of a training micro-batch.
        train_prompt: tokens of each row that the prefill module reads, and the first decode token.
        train_answer: answer tokens of each row.
    """

    batch: int = 32
    context: int = 4096
    chunk: int = 512
    page_size: int = 32
    lora_modules: int = 4
    lora_rank: int = 16
    train_batch: int = 8
    train_prompt: int = 2048
    train_answer: int = 256


@dataclass(frozen=True)
class Program:
    """One computation to compile.

    Args:
        name: its name in tables.
        function: under jit.
        arguments: abstract.
        weight_bytes: of one device.
        pool_bytes: KV pages of one device.
        bytes_per_token: KV of one token on one device.
        least_bytes: bytes that one device must move at least, live KV of `Sizes.context` included.
        least_flops: operations of one device.
        resident_bytes: what else lies in one device's memory while it runs.
        resident_pool_bytes: of `pool_bytes`, the pages of layers that are not compiled; a part of
            `resident_bytes`.
        mesh: sizes of the axes `data`, `fsdp` and `tensor`, of a training program only.
        compiler_options: XLA's, where they are not the defaults.
        pages_read: KV that a decode step reads from pages, in bytes of one device.
    """

    name: str
    function: Any
    arguments: tuple
    weight_bytes: int = 0
    pool_bytes: int = 0
    bytes_per_token: int = 0
    least_bytes: float = 0.0
    least_flops: float = 0.0
    resident_bytes: int = 0
    resident_pool_bytes: int = 0
    mesh: str = ""
    compiler_options: Mapping[str, float] = field(default_factory=dict)
    pages_read: float = 0.0


def abstract(shape: tuple[int, ...], dtype: Any, sharding: Sharding | Format) -> Any:
    """A ShapeDtypeStruct, typed as what the traced function sees."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def bytes_per_device(arrays: Any) -> int:
    """Bytes of the arrays of a pytree on one device."""
    return sum(
        math.prod(a.sharding.shard_shape(a.shape)) * jnp.dtype(a.dtype).itemsize
        for a in jax.tree.leaves(arrays)
    )


POOL_SHARE = 0.5
"""Of what the weights leave of a device's memory, how much the compiled programs' pool takes."""

NAMES = {
    "chunk": "prefill chunk",
    "gather": "handoff: gather",
    "scatter": "handoff: scatter",
    "decode": "decode step",
    "decode, shared pages": "decode step, one shared context",
    "choose": "choice of masked tokens",
}
"""Programs of serving that have a row, and what they are called there."""


class Side:
    """One mesh of one model: its weights, its pool, and the programs of serving on it.

    Args:
        accelerator: what is compiled for.
        config: the model.
        mesh: devices of the accelerator.
        sizes: of the programs.
        lora: whether there are LoRA modules.
        whole: the side of a model of which `config` is some layers, to be compiled in its place:
            it compiles faster, and the pool has the whole one's pages.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: ModelConfig,
        mesh: Mesh,
        sizes: Sizes,
        lora: bool = False,
        whole: Side | None = None,
    ):
        self.config, self.mesh, self.sizes = config, mesh, sizes
        self._whole = whole or self
        specs = weight_specs(config)
        shardings = weight_shardings(mesh, specs)
        self.weights = {
            name: abstract(spec.shape, spec.dtype or DTYPE, shardings[name])
            for name, spec in specs.items()
        }
        layout = PageLayout.of(config, sizes.page_size, DTYPE)
        decode = DecodeConfig(
            batch_buckets=[sizes.batch], max_num_seqs=sizes.batch, replay_buckets=[sizes.page_size]
        )
        spec = StepSpec(config, accelerator.backend, mesh)
        self.programs = Programs(spec, layout, mesh, sizes.context, [sizes.chunk], decode)
        self.adapters = self._adapters() if lora else None
        one_page = bytes_per_device(self.pool(1))
        free = accelerator.memory - bytes_per_device((self.weights, self.adapters))
        self.num_pages = max(int(POOL_SHARE * free // one_page), sizes.batch)
        if whole is not None:
            self.num_pages = whole.num_pages
        self.bytes_per_token = one_page // sizes.page_size

    def _adapters(self) -> dict[str, Any]:
        """Stacked LoRA factors of all projections, as `models.lora.stack_adapters` shapes them."""
        count, stacked = self.sizes.lora_modules, {}
        for name, spec in lora_specs(
            self.config, self.sizes.lora_rank, lora_targets(self.config)
        ).items():
            shape = list(spec.shape)
            shape.insert(len(shape) - 1 if name.endswith(".lora_a") else 0, count)
            stacked[name] = abstract(tuple(shape), DTYPE, self.programs.everywhere)
        return stacked

    def pool(self, num_pages: int) -> tuple[Any, ...]:
        """Abstract pages of all layers."""
        layout = self.programs.layout
        placement = layout.placement(self.programs.pool_sharding)
        one = abstract(layout.layer_shape(num_pages), DTYPE, placement)
        return (one,) * self.config.num_layers

    def program(self, call: Call) -> Program:
        """What serving calls, with abstract arguments; memory is that of the whole model, and the
        floors are those of the layers that are compiled."""
        given = {
            Slot.WEIGHTS: self.weights,
            Slot.ADAPTERS: self.adapters,
            Slot.POOL: self.pool(self.num_pages),
            Slot.HISTORY: self._everywhere(jax.eval_shape(self.programs.history)),
            Slot.STAGED: abstract(
                self.programs.staged_shape(call.size[0]), DTYPE, self.programs.staging
            ),
            Slot.LEFT: self._logits(),
        }
        arguments = tuple(
            given[argument] if isinstance(argument, Slot) else self._everywhere(argument)
            for argument in call.arguments
        )
        floors = self._floors(call)
        weight_bytes, pool_bytes = self._resident(call)
        weights_of_all, pool_of_all = self._whole._resident(call)
        return Program(
            NAMES[call.name],
            call.function,
            arguments,
            weight_bytes=weights_of_all,
            pool_bytes=pool_of_all,
            bytes_per_token=self._whole.bytes_per_token if pool_bytes else 0,
            resident_bytes=weights_of_all - weight_bytes + pool_of_all - pool_bytes,
            resident_pool_bytes=pool_of_all - pool_bytes,
            least_bytes=floors.get("least_bytes", 0.0),
            least_flops=floors.get("least_flops", 0.0),
            pages_read=floors.get("pages_read", 0.0),
        )

    def _resident(self, call: Call) -> tuple[int, int]:
        """Bytes of one device: the weights and the pages that a call is given."""
        weights = (self.weights, self.adapters) if Slot.WEIGHTS in _slots(call) else ()
        pool = self.pool(self.num_pages) if Slot.POOL in _slots(call) else ()
        return bytes_per_device(weights), bytes_per_device(pool)

    def _logits(self) -> Any:
        """Those of a step, split as the head is."""
        sharding = self.weights.get("lm_head.kernel", self.weights["embed.embedding"]).sharding
        axis = TENSOR if TENSOR in jax.tree.leaves(tuple(sharding.spec)) else None
        spec = NamedSharding(self.mesh, PartitionSpec(None, axis))
        return abstract((self.sizes.batch, self.config.vocab_size), jnp.float32, spec)

    def _everywhere(self, tree: Any) -> Any:
        """The arrays of a tree as abstract ones on every device."""
        everywhere = self.programs.everywhere
        return jax.tree.map(lambda a: abstract(a.shape, a.dtype, everywhere), tree)

    def _floors(self, call: Call) -> dict[str, float]:
        sizes = self.sizes
        if call.name in ("gather", "scatter"):
            staged = self.programs.staged_shape(call.size[0])
            one = abstract(staged, DTYPE, self.programs.staging)
            return {"least_bytes": 2 * bytes_per_device(one)}
        if call.name == "choose":
            mask = call.arguments[-1].mask
            return {"least_bytes": bytes_per_device(self._logits()) + mask.nbytes}
        if call.name == "chunk":
            return self._step_floors(*call.size, head=False)
        floors = self._step_floors(sizes.batch, 1, head=True)
        floors["pages_read"] = self.bytes_per_token * sizes.batch * sizes.context
        inputs = call.arguments[-1]
        if isinstance(inputs, DecodeInput) and inputs.runs is not None:
            # At the least all rows share one run.
            saved = self.bytes_per_token * (sizes.batch - 1) * sizes.context
            floors["least_bytes"] -= saved
            floors["pages_read"] -= saved
        return floors

    def _step_floors(self, batch: int, tokens: int, head: bool) -> dict[str, float]:
        """Least bytes and operations of a step that feeds `tokens` a row, the last at `context`."""
        config = self.config
        unread = [] if config.tie_word_embeddings and head else ["embed.embedding"]
        unread += [] if head else ["lm_head.kernel"]
        read = {name: w for name, w in self.weights.items() if name not in unread}
        products = 2 * used_parameters(config) * batch * tokens
        if head:
            products += 2 * config.hidden_size * config.vocab_size * batch * tokens
        seen = tokens * (self.sizes.context - (tokens - 1) / 2)
        attention = 4 * config.num_layers * config.num_heads * config.head_dim * batch * seen
        return {
            "least_bytes": bytes_per_device(read)
            + self.bytes_per_token * batch * self.sizes.context,
            "least_flops": (products + attention) / self.mesh.size,
        }


def _slots(call: Call) -> list[Slot]:
    return [argument for argument in call.arguments if isinstance(argument, Slot)]


def step_programs(
    accelerator: Accelerator,
    config: ModelConfig,
    sizes: Sizes,
    part: ModelConfig | None = None,
) -> Iterator[Program]:
    """The programs of a serving machine: prefill and sending on one mesh, receiving and decode on
    the other.

    Args:
        accelerator: the machine.
        config: the model.
        sizes: of the programs.
        part: some layers of the model, which are compiled alone in its memory; None: all.
    """
    [prefill_mesh], [decode_mesh] = carve(
        accelerator.devices(), 1, accelerator.prefill, 1, accelerator.decode
    )
    prefill = _side(accelerator, config, prefill_mesh, sizes, part)
    decode = _side(accelerator, config, decode_mesh, sizes, part)
    yield from _rows(prefill, prefill.programs.prefill_calls())
    yield from _rows(prefill, prefill.programs.sending_calls())
    yield from _rows(decode, decode.programs.receiving_calls())
    yield from _rows(decode, decode.programs.decode_calls())


def one_chip_programs(
    accelerator: Accelerator,
    config: ModelConfig,
    sizes: Sizes,
    part: ModelConfig | None = None,
) -> Iterator[Program]:
    """The programs of one chip with one pool, one set of weights and LoRA modules over them;
    arguments as for `step_programs`."""
    [mesh] = carve_one(accelerator.devices(), 1, 1)
    side = _side(accelerator, config, mesh, sizes, part, lora=True)
    yield from _rows(side, side.programs.prefill_calls())
    yield from _rows(side, side.programs.decode_calls())


def _side(
    accelerator: Accelerator,
    config: ModelConfig,
    mesh: Mesh,
    sizes: Sizes,
    part: ModelConfig | None,
    lora: bool = False,
) -> Side:
    whole = Side(accelerator, config, mesh, sizes, lora)
    return whole if part is None else Side(accelerator, part, mesh, sizes, lora, whole)


def _rows(side: Side, calls: Iterable[Call]) -> Iterator[Program]:
    """One program a kind: the largest transfer, and what is as large as `Sizes` says anyway."""
    for call in calls:
        if call.name in NAMES and not (
            call.name in ("gather", "scatter") and call.size != (max(TRANSFER_BUCKETS),)
        ):
            yield side.program(call)
