"""`bench weights`: what weights of 8 bits save of memory, and what they change of the answers."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import jax.numpy as jnp
import numpy as np

from pshare_jax.bench.distributions import TextsOptions, divergence, perplexity
from pshare_jax.bench.machine import describe
from pshare_jax.convert.orbax import open_weights
from pshare_jax.convert.seals import open_checkpoint
from pshare_jax.convert.streamed import Head, hidden_states
from pshare_jax.convert.tensors import DTYPES, STORED_DTYPES, LazyTensor
from pshare_jax.kernels.matmul.rounded import rounded
from pshare_jax.models.config import ModelConfig, WeightFormat
from pshare_jax.models.quantise import in_format, quantise
from pshare_jax.models.weight_formats import rounds
from pshare_jax.models.weights import SCALE, weight_specs

FORMS: tuple[WeightFormat, ...] = ("int8", "int8-dynamic", "fp8")


def run(options: TextsOptions) -> dict[str, Any]:
    """Bytes of the weights in each form, and how far the next-token distributions are apart.

    Logits are computed in float32, so that only the rounding counts that a form is.

    Raises:
        CheckpointError: no such checkpoint.
        ConfigError: its architecture has no weights of 8 bits.
    """
    manifest = open_checkpoint(options.base)
    config = manifest.config
    forms = {form: in_format(config, form) for form in FORMS}
    encoded = options.encoded(manifest)
    plain = open_weights(manifest)
    logits = Head(config, plain).logits(hidden_states(config, plain, encoded))
    return {
        "options": asdict(options),
        "machine": describe(),
        "positions": len(logits),
        "plain": {"bytes": _bytes(config), "perplexity": perplexity(logits, encoded)},
        **{form: _compared(model, plain, encoded, logits) for form, model in forms.items()},
    }


def lines(result: dict[str, Any]) -> Sequence[str]:
    """The result as a Markdown table."""
    plain = result["plain"]
    return (
        "| weights | MB | perplexity | mean KL (nats) | same most likely token |",
        "|---|---|---|---|---|",
        f"| bfloat16 | {plain['bytes'] / 1e6:.1f} | {plain['perplexity']:.3f} | | |",
        *(
            f"| {form} | {found['bytes'] / 1e6:.1f} | {found['perplexity']:.3f} "
            f"| {found['mean_kl']:.2g} | {found['same_best']:.1%} of {result['positions']} |"
            for form, found in ((form, result[form]) for form in FORMS)
        ),
    )


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
