"""One model served on one device: prefill and decode through the engine, beside the roofline."""

from __future__ import annotations

import statistics
from typing import Any

import jax.numpy as jnp

from pshare_jax.bench.hardware.device import describe
from pshare_jax.bench.hardware.kernels import Keep
from pshare_jax.bench.hardware.random_models import (
    base_module,
    engine,
    engine_config,
    random_weights,
    weight_bytes,
)
from pshare_jax.bench.hardware.scale import Scale
from pshare_jax.bench.micro_rates import Rates
from pshare_jax.bench.micro_targets import MODEL, EngineTarget
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.weights import used_parameters
from pshare_jax.runtime.layout import PageLayout

OURS = "ours"


def run(scale: Scale, model: ModelConfig, keep: Keep) -> None:
    """Keeps `weight_bytes`; `prefill`: `{"tokens", "tok_s", "tflop_s", "of_peak"}`; `decode`: a
    list of `{"rows", "context", "shared", "tok_s", "step_ms", "least_bytes", "gb_s",
    "of_bandwidth"}`; `shared_gain`, tokens/s of rows over one context to those over as many;
    `compiles`, after warm-up.

    `least_bytes` are what a step must read at least: the weights once, and the KV of its rows, a
    shared context's once. `of_peak` and `of_bandwidth` are shares of the vendor's figures.
    """
    room = scale.window * (scale.repeats + 4)
    config = engine_config(scale, scale.batch, scale.context, room)
    load = random_weights(model, 0, jnp.dtype(scale.dtype))
    with engine(config, model, [base_module(MODEL, load)], load) as made:
        rates = Rates(
            {OURS: EngineTarget(made)}, model.vocab_size, room, scale.window, scale.repeats, 0
        )
        rates.prefill(scale.context)  # the first run of everything is not counted
        keep("weight_bytes", weight_bytes(model, scale.dtype))
        keep("prefill", _prefill(scale, model, rates))
        decode = []
        alone = [(1, False)] * scale.alone
        for rows, shared in (*alone, (scale.batch, False), (scale.batch, True)):
            found = rates.decode(scale.context, [MODEL] * rows, one_prompt=shared)[OURS]
            decode.append(_decode(scale, model, rows, shared, statistics.median(found)))
            keep("decode", decode)
        keep("shared_gain", decode[-1]["tok_s"] / decode[-2]["tok_s"])
        keep("compiles", made.stats().compiles)


def _prefill(scale: Scale, model: ModelConfig, rates: Rates) -> dict[str, Any]:
    tokens = scale.context
    rate = statistics.median(rates.prefill(tokens)[OURS])
    attention = 4 * model.num_layers * model.num_heads * model.head_dim * tokens * (tokens + 1) / 2
    flops = 2 * used_parameters(model) * tokens + attention
    tflop_s = flops * rate / tokens / 1e12
    peak = describe()["peak"]
    return {
        "tokens": tokens,
        "tok_s": rate,
        "tflop_s": tflop_s,
        "of_peak": tflop_s * 1e12 / peak if peak else None,
    }


def _decode(
    scale: Scale, model: ModelConfig, rows: int, shared: bool, rate: float
) -> dict[str, Any]:
    dtype = jnp.dtype(scale.dtype)
    layout = PageLayout.of(model, scale.page_size, dtype)
    # The embedding is read whole where it is the head too, else a line a row.
    unread = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
    read = weight_bytes(model, dtype) - unread * dtype.itemsize
    least = read + layout.bytes_per_token * scale.context * (1 if shared else rows)
    gb_s = least * rate / rows / 1e9
    bandwidth = describe()["bandwidth"]
    return {
        "rows": rows,
        "context": scale.context,
        "shared": shared,
        "tok_s": rate,
        "step_ms": 1000 * rows / rate,
        "least_bytes": least,
        "gb_s": gb_s,
        "of_bandwidth": gb_s * 1e9 / bandwidth if bandwidth else None,
    }
