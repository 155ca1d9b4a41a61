"""`bench weights`: what weights of 8 bits save of memory, and what they change of the answers."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from pshare_jax.bench.distributions import TextsOptions, divergence, perplexity
from pshare_jax.bench.machine import describe
from pshare_jax.bench.weights_memory import grown_by
from pshare_jax.config import WeightFormat
from pshare_jax.convert.orbax import open_weights
from pshare_jax.convert.seals import open_checkpoint
from pshare_jax.convert.streamed import Head, hidden_states
from pshare_jax.convert.tensors import DTYPES, STORED_DTYPES, LazyTensor
from pshare_jax.errors import BenchmarkError
from pshare_jax.kernels.matmul.rounded import rounded
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.quantise import in_format, quantise
from pshare_jax.models.weight_formats import rounds
from pshare_jax.models.weights import SCALE, weight_specs

FORMS: tuple[WeightFormat, ...] = ("int8", "int8-dynamic", "fp8")


@dataclass(frozen=True)
class WeightsOptions(TextsOptions):
    """What is measured.

    Args:
        processes: that make an engine on the CPU, for each form, to see what they grow by; 0 for
            none.
    """

    processes: int = 3


def run(options: WeightsOptions) -> dict[str, Any]:
    """Bytes of the weights in each form, what engines' processes grow by when they load them, and
    how far the next-token distributions are apart.

    Logits are computed in float32, so that only the rounding counts that a form is.

    Returns:
        `{"options", "machine", "positions", "plain", "int8", "int8-dynamic", "fp8"}`: of each form
        `bytes`, `memory` (bytes, one number a process) and `perplexity`, and of those of 8 bits
        `mean_kl` (nats) and `same_best` (share of positions) beside the plain one.

    Raises:
        BenchmarkError: memory could not be measured, or the checkpoint has weights of 8 bits
            already, as which an engine loads what is called plain here.
        CheckpointError: no such checkpoint.
        ConfigError: its architecture has no weights of 8 bits.
    """
    manifest = open_checkpoint(options.base)
    if manifest.weights != "plain":
        raise BenchmarkError(
            f"{options.base}: its weights are {manifest.weights} already; take a base that was "
            "imported with --dequantise"
        )
    config = manifest.config
    forms = {form: in_format(config, form) for form in FORMS}
    encoded = options.encoded(manifest)
    plain = open_weights(manifest)
    memory = grown_by(options.base, ("plain", *FORMS), options.processes)
    logits = Head(config, plain).logits(hidden_states(config, plain, encoded))
    found = {
        "plain": {"bytes": _bytes(config), "perplexity": perplexity(logits, encoded)},
        **{form: _compared(model, plain, encoded, logits) for form, model in forms.items()},
    }
    return {
        "options": asdict(options),
        "machine": describe(),
        "positions": len(logits),
        **{form: {**about, "memory": memory[form]} for form, about in found.items()},
    }


def lines(result: dict[str, Any]) -> Sequence[str]:
    """The result as a Markdown table; memory is the median of the processes (lowest - highest)."""
    plain = result["plain"]
    return (
        "| weights | MB | memory, MB | perplexity | mean KL (nats) | same most likely token |",
        "|---|--:|--:|--:|--:|--:|",
        f"| bfloat16 {_sizes(plain)} | {plain['perplexity']:.3f} | | |",
        *(
            f"| {form} {_sizes(found)} | {found['perplexity']:.3f} "
            f"| {found['mean_kl']:.2g} | {found['same_best']:.1%} of {result['positions']} |"
            for form, found in ((form, result[form]) for form in FORMS)
        ),
    )


def _sizes(found: Mapping[str, Any]) -> str:
    """The columns of bytes: of the weights, and of the processes."""
    memory = [grown / 1e6 for grown in found["memory"]]
    shown = (
        f"{statistics.median(memory):.0f} ({min(memory):.0f} - {max(memory):.0f})" if memory else ""
    )
    return f"| {found['bytes'] / 1e6:.1f} | {shown}"


def _compared(
    config: ModelConfig,
    plain: Mapping[str, LazyTensor],
    encoded: Sequence[Sequence[int]],
    expected: np.ndarray,
) -> dict[str, float]:
    """What the weights in the form of `config` give, beside the logits of plain ones."""
    tensors = _quantised(config, plain)
    hidden = hidden_states(config, tensors, encoded)
    if rounds(config.weight_format):
        whole, scale = rounded(jnp.asarray(hidden))
        values = (whole * scale[..., None]).reshape(len(hidden), -1)
        hidden = np.asarray(values)[:, : config.hidden_size]
    logits = Head(config, tensors).logits(hidden)
    return {
        "bytes": _bytes(config),
        "perplexity": perplexity(logits, encoded),
        "mean_kl": float(np.mean(divergence(expected, logits))),
        "same_best": float(np.mean(expected.argmax(-1) == logits.argmax(-1))),
    }


def _bytes(config: ModelConfig) -> int:
    """Of all weights, those without a dtype of their own in bfloat16."""
    specs = weight_specs(config).values()
    return sum(math.prod(s.shape) * STORED_DTYPES[s.dtype or "bfloat16"].itemsize for s in specs)


def _quantised(config: ModelConfig, plain: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The weights in the form of `config`, in float32: numbers of 8 bits and their scales.

    What is read by rows, not multiplied, has the values that these stand for.
    """
    specs = weight_specs(config)

    def read(name: str, part: str) -> np.ndarray:
        found = quantise(config, {name: jnp.asarray(plain[name].read())})
        if part == name and not name.startswith("layers.") and name + SCALE in found:
            scale = found[name + SCALE]
            scale = scale[:, None] if specs[name].axes[0] == "vocab" else scale
            return np.asarray(found[name].astype(jnp.float32) * scale)
        return np.asarray(found[part].astype(jnp.float32))

    return {
        part: LazyTensor(specs[part].shape, DTYPES["float32"], functools.partial(read, name, part))
        for name in plain
        for part in (name, name + SCALE)
        if part in specs
    }
