"""A run before its first step: everything that follows from the configuration and the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from pshare_jax.convert.manifest import Manifest
from pshare_jax.core.split_rule import LAST_TOKEN, SplitRule
from pshare_jax.kernels.backends import CPU_FFI
from pshare_jax.kernels.matmul.api import training_backend
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.packed import is_packed, pack_weights, unsupported
from pshare_jax.models.weights import Weights
from pshare_jax.train.answers import answer_with_teacher
from pshare_jax.train.batches import MicroBatch, Plan, fill_micro_batches, make_plan
from pshare_jax.train.buckets import Bucket, choose_buckets
from pshare_jax.train.config import TrainConfig
from pshare_jax.train.data import Dataset
from pshare_jax.train.distributed import make_mesh
from pshare_jax.train.fine_tune import FineTune
from pshare_jax.train.hooks import load_hook
from pshare_jax.train.inputs import Inputs, read_inputs
from pshare_jax.train.kv_store import KVStore, open_store, store_key
from pshare_jax.train.layout import Row, make_row
from pshare_jax.train.loss import LoraShape, Recipe
from pshare_jax.train.optimizer import make_optimizer, step_rates
from pshare_jax.train.output import open_run
from pshare_jax.train.report import Reporter
from pshare_jax.train.step import Computations
from pshare_jax.train.weights import initial_weights, load_base, trainable_specs

_FEW_STEPS = 50


@dataclass
class Job:
    """A run's parts.

    Args:
        config: its configuration.
        base: the prefill checkpoint.
        rule: the decode module's split rule; in mode `full` that of how it is served.
        identity: what `run.json` says.
        rows: training rows, then evaluation rows.
        plan: the steps.
        rates: the learning rate of each: `[steps]` float32.
        evaluation: micro-batches of the evaluation rows; empty without.
        computations: the compiled functions.
        trainable: float32 master weights at the start.
        frozen: what the loss reads besides: `base` for LoRA, `teacher` when distilling.
        base_weights: the prefill module's, while its KV is computed anew for each batch.
        store: its KV of the rows that are used, when that is kept.
    """

    config: TrainConfig
    base: Manifest
    rule: SplitRule
    identity: dict[str, Any]
    rows: list[Row]
    plan: Plan
    rates: np.ndarray
    evaluation: list[MicroBatch]
    computations: Computations
    trainable: Weights
    frozen: Mapping[str, Weights]
    base_weights: Weights | None
    store: KVStore | None


def _answer(
    config: TrainConfig,
    dataset: Dataset,
    inputs: Inputs,
    identity: dict[str, Any],
    recipe: Recipe,
    weights: Weights,
    reporter: Reporter,
) -> Dataset:
    return answer_with_teacher(
        dataset,
        recipe,
        weights,
        inputs.tokenizer,
        teacher=identity["sources"]["teacher"],
        max_tokens=config.distill.max_tokens,
        max_length=min(config.data.max_length, inputs.positions),
        folder=config.folder,
        write=jax.process_index() == 0,
        reporter=reporter,
    )


def _dtype(config: TrainConfig, model: ModelConfig, platform: str, num_devices: int) -> str:
    """As the server's `auto`: what is trained in one dtype would be served in it."""
    if config.dtype != "auto":
        return config.dtype
    if platform != "cpu":
        return "bfloat16"
    matmul = training_backend(config.kernel_backend, platform, num_devices, "bfloat16")
    in_cpp = matmul == CPU_FFI and unsupported(model) is None
    return "bfloat16" if in_cpp else "float32"


def prepare(config: TrainConfig, reporter: Reporter) -> Job:
    """Reads the data, loads the weights, and computes the KV that is kept.

    Raises:
        ConfigError, DataError, CheckpointError: names the key, line or file that cannot be used.
    """
    is_first = jax.process_index() == 0
    inputs = read_inputs(config, reporter, first=is_first)
    base, rule, teacher = inputs.base, inputs.rule, inputs.teacher
    train, held_out = inputs.train, inputs.held_out
    mesh = make_mesh(config.mesh)
    recipe = _recipe(config, base, teacher, mesh)
    known = replace(config, dtype=recipe.dtype)
    identity = open_run(known, inputs.base, train, held_out, write=is_first)

    frozen: dict[str, Weights] = {}
    if teacher is not None:
        weights = frozen["teacher"] = teacher.load(mesh, jnp.dtype(recipe.dtype))
        reads = Recipe(teacher.config, recipe.dtype, matmul=recipe.matmul)
        train, held_out = (
            dataset and _answer(config, dataset, inputs, identity, reads, weights, reporter)
            for dataset in (train, held_out)
        )
        assert train is not None
    num_train = len(train.examples)
    examples = train.examples + (held_out.examples if held_out else [])
    rows = [make_row(example, None if config.mode == "full" else rule) for example in examples]
    plan, evaluation = _plan(config, rows, num_train)
    if len(plan.steps) < _FEW_STEPS and not config.optimizer.max_steps:
        reporter.say(
            f"warning: {num_train:,} examples make {len(plan.steps)} steps, which is few to learn "
            "from; raise optimizer.epochs, or lower optimizer.batch_size"
        )
    computations = Computations(
        recipe,
        make_optimizer(config.optimizer, len(plan.steps)),
        mesh,
        trainable_specs(base.config, recipe.lora),
    )
    trainable = initial_weights(base, recipe.lora, inputs.start, mesh, config.seed)
    base_weights, store = None, None
    if config.mode != "full" or recipe.lora is not None:
        base_weights = load_base(base, mesh, jnp.dtype(recipe.dtype))
    if recipe.lora is not None:
        assert base_weights is not None
        frozen["base"] = base_weights
    if config.mode == "full":
        base_weights = None
    else:
        assert base_weights is not None
        if is_packed(recipe.matmul, base.config):
            base_weights = pack_weights(base.config, base_weights)
        used = {row for step in plan.steps for micro in step for row in micro.rows}
        used.update(range(num_train, len(rows)))
        # A longer tail reads a part of the same KV.
        kept = rows if rule == LAST_TOKEN else [make_row(e, LAST_TOKEN) for e in examples]
        store = _kept_kv(config, base, kept, sorted(used), computations, base_weights, reporter)
        if store is not None:
            base_weights = None
    return Job(
        config,
        base,
        rule,
        identity,
        rows,
        plan,
        step_rates(config.optimizer, len(plan.steps)),
        evaluation,
        computations,
        trainable,
        frozen,
        base_weights,
        store,
    )


def _recipe(config: TrainConfig, base: Manifest, teacher: FineTune | None, mesh: Mesh) -> Recipe:
    platform = mesh.devices.flat[0].platform
    dtype = _dtype(config, base.config, platform, mesh.size)
    lora = None
    if config.lora.rank:
        lora = LoraShape(config.lora.rank, config.lora_alpha, tuple(config.lora.targets))
    return Recipe(
        base.config,
        dtype,
        lora,
        teacher.config if teacher else None,
        config.remat,
        training_backend(config.kernel_backend, platform, mesh.size, dtype),
        load_hook(config.loss, "loss") if config.loss else None,
        barriers=platform != "cpu",
    )


def _plan(
    config: TrainConfig, rows: Sequence[Row], num_train: int
) -> tuple[Plan, list[MicroBatch]]:
    """The steps over the first `num_train` rows, and the micro-batches of the other rows."""
    buckets, assigned = choose_buckets(rows, config.data.buckets)
    size, optimizer = config.micro_batch_size, config.optimizer
    plan = make_plan(
        buckets,
        assigned[:num_train],
        micro_batch_size=size,
        batch_size=optimizer.batch_size,
        epochs=optimizer.epochs,
        max_steps=optimizer.max_steps,
        seed=config.seed,
    )
    held_out = np.arange(num_train, len(rows))
    return plan, fill_micro_batches(held_out, buckets, assigned, size)


def _kept_kv(
    config: TrainConfig,
    base: Manifest,
    rows: Sequence[Row],
    used: list[int],
    computations: Computations,
    base_weights: Weights,
    reporter: Reporter,
) -> KVStore | None:
    """The base's KV of the rows `used`, computed as far as it is not there; None when it does not
    fit its budget."""
    dtype, matmul = computations.recipe.dtype, computations.recipe.matmul
    folder = Path(config.kv_cache.folder or config.output).expanduser()
    buckets, assigned = choose_buckets(rows, config.data.buckets, decode_cost=0)
    size = config.micro_batch_size
    key = store_key(base.fingerprint, dtype, rows, buckets, size)
    if matmul != "xla":
        key += f"-{matmul}"  # other bits
    if jax.process_count() > 1:
        # Processes of one machine may share the folder.
        key += f"-{jax.process_index()}"
    store, message = open_store(base.config, rows, dtype, config.kv_cache, folder, key)
    reporter.say(message)
    if store is not None:
        if jax.process_count() > 1:
            # Each has a file of its own, and all compute each batch together.
            store.forget(~multihost_utils.process_allgather(store.filled).all(axis=0))
        _fill(store, computations, base_weights, used, buckets, assigned, size, reporter)
    return store


def _fill(
    store: KVStore,
    computations: Computations,
    base: Weights,
    rows: list[int],
    buckets: list[Bucket],
    assigned: np.ndarray,
    size: int,
    reporter: Reporter,
) -> None:
    def compute(prompt: np.ndarray) -> np.ndarray:
        batch = computations.put({"prompt": prompt})
        return computations.to_host(computations.base_kv(base, batch["prompt"]))

    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        reporter.advance("KV of prompts", done, len(rows))

    reporter.start("KV of prompts", len(rows))
    store.fill(np.array(rows), buckets, assigned, size, compute, report)
    reporter.stop()
