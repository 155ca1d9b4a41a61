"""Models of random weights from seeds, made on the device, and engines over them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from pshare_jax.bench.hardware.device import need_memory
from pshare_jax.bench.hardware.scale import Scale
from pshare_jax.config import DecodeConfig, ModelEntry, PrefillConfig, ServeConfig
from pshare_jax.core.split_rule import LAST_TOKEN
from pshare_jax.engine.devices import compute_dtype, prepare_jax
from pshare_jax.engine.orchestrator import Orchestrator
from pshare_jax.engine.sources import BaseSource, ModelSource
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.split import Certificate
from pshare_jax.models.weights import Weights, weight_specs
from pshare_jax.runtime.layout import PageLayout

FINGERPRINT = "random"
TEMPORARIES = 2**30
"""Bytes that steps may take beside weights and pages."""

LoadTensors = Callable[[Mapping[str, Sharding]], Weights]


def weight_bytes(model: ModelConfig, dtype: Any) -> int:
    """Bytes of a full module's weights."""
    count = sum(math.prod(spec.shape) for spec in weight_specs(model).values())
    return count * jnp.dtype(dtype).itemsize


@functools.cache
def _maker(shape: tuple[int, ...], inputs: int | None, dtype: Any, sharding: Sharding) -> Any:
    """Makes a weight of a key, compiled once for all that are alike; a norm has no inputs."""

    def make(key: jax.Array) -> jax.Array:
        if inputs is None:
            return jnp.ones(shape, dtype)
        # In the weights' own dtype: float32 of a large embedding would double the peak.
        return jax.random.normal(key, shape, dtype) * jnp.asarray(inputs**-0.5, dtype)

    return jax.jit(make, out_shardings=sharding)


def random_weights(model: ModelConfig, seed: int, dtype: Any) -> LoadTensors:
    """Loads weights that keep activations near unit scale, as `models.decoder.init_weights`, but
    made on the device that they are for."""

    def load(shardings: Mapping[str, Sharding]) -> Weights:
        weights: Weights = {}
        for number, (name, spec) in enumerate(weight_specs(model).items()):
            key = jax.random.fold_in(jax.random.key(seed), number)
            is_norm = name.endswith(".scale")
            make = _maker(spec.shape, None if is_norm else spec.inputs, dtype, shardings[name])
            weights[name] = make(key)
        return weights

    return load


def full_module(name: str, model: ModelConfig, seed: int, dtype: Any, sharing: Any) -> ModelSource:
    """A full decode module of random weights, `shared` or `isolated`."""
    certificate = Certificate(
        prefill_fingerprint=FINGERPRINT,
        tail=LAST_TOKEN,
        kind="full",
        cache_conditioned=True,
        weights_fingerprint=f"random-{seed}",
    )
    return ModelSource(
        name, "full", sharing, random_weights(model, seed, dtype), certificate=certificate
    )


def base_module(name: str, load: LoadTensors) -> ModelSource:
    """The base itself as a served model."""
    return ModelSource(name, "identity", "shared", load)


def engine_config(
    scale: Scale, rows: int, context: int, room: int, contexts: int = 0
) -> ServeConfig:
    """One device and one pool, for `rows` rows of `context` tokens to which `room` come.

    The pool holds so many rows, or as many as `contexts` says.
    """
    longest = context + room
    pages = (contexts or rows) * (-(-longest // scale.page_size) + 1) + 1
    return ServeConfig(
        base="random",
        models=[ModelEntry("unused")],
        dtype="float32" if scale.dtype == "float32" else "bfloat16",
        max_model_len=longest,
        page_size=scale.page_size,
        kernel_backend=scale.engine_backend,
        connector="same-mesh",
        reply_kv="off",
        prefill=PrefillConfig(num_pages=pages, chunk_buckets=[scale.chunk]),
        decode=DecodeConfig(
            num_pages=pages,
            max_num_seqs=rows,
            batch_buckets=sorted({1, rows}) if scale.alone else [rows],
            replay_buckets=[scale.page_size],
            shared_prefix="on",
        ),
    )


@contextmanager
def engine(
    config: ServeConfig, model: ModelConfig, sources: Sequence[ModelSource], load: LoadTensors
) -> Iterator[Orchestrator]:
    """A started engine.

    Raises:
        SkippedError: it would not fit into the device's memory.
    """
    prepare_jax(config)
    dtype = compute_dtype(config, model)
    kinds = [source for source in sources if source.kind == "full"]
    pool = PageLayout.of(model, config.page_size, dtype).bytes_per_page * config.prefill.num_pages
    need_memory((1 + len(kinds)) * weight_bytes(model, dtype) + pool + TEMPORARIES)
    made = Orchestrator(config, BaseSource(model, FINGERPRINT, load), list(sources))
    made.start()
    try:
        yield made
    finally:
        made.stop()
