"""`bench fp8-kv`: what KV of 8 bits saves of memory, and what it changes of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from pshare_jax.bench.distributions import TextsOptions, divergence, perplexity
from pshare_jax.bench.machine import describe
from pshare_jax.convert.orbax import open_weights
from pshare_jax.convert.seals import open_checkpoint
from pshare_jax.convert.streamed import Head, hidden_states
from pshare_jax.kernels.kv_dtype import FP8
from pshare_jax.runtime.layout import PageLayout


def run(options: TextsOptions) -> dict[str, Any]:
    """Bytes of a token's KV in bfloat16 and in 8 bits, and how far the distributions are apart.

    All else is computed in float32, so that only the rounding of keys and values counts.

    Raises:
        CheckpointError: no such checkpoint.
    """
    manifest = open_checkpoint(options.base)
    config, tensors = manifest.config, open_weights(manifest)
    encoded = options.encoded(manifest)
    head = Head(config, tensors)
    exact = head.logits(hidden_states(config, tensors, encoded))
    found = {}
    for name, dtype in (("bfloat16", "bfloat16"), ("fp8", FP8)):
        logits = head.logits(hidden_states(config, tensors, encoded, dtype))
        found[name] = {
            "bytes": PageLayout.of(config, 1, dtype).bytes_per_token,
            "perplexity": perplexity(logits, encoded),
            "mean_kl": float(np.mean(divergence(exact, logits))),
            "same_best": float(np.mean(exact.argmax(-1) == logits.argmax(-1))),
        }
    return {
        "options": asdict(options),
        "machine": describe(),
        "positions": len(exact),
        "perplexity": perplexity(exact, encoded),
        "kv": found,
    }


def lines(result: dict[str, Any]) -> Sequence[str]:
    """The result as a Markdown table."""
    return (
        "| KV | bytes a token | perplexity | mean KL (nats) | same most likely token |",
        "|---|---|---|---|---|",
        f"| float32 | | {result['perplexity']:.3f} | | |",
        *(
            f"| {name} | {about['bytes']:,} | {about['perplexity']:.3f} | {about['mean_kl']:.2g} "
            f"| {about['same_best']:.1%} of {result['positions']} |"
            for name, about in result["kv"].items()
        ),
    )
