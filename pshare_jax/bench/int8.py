"""`bench int8`: what weights of 8 bits save of memory, and what they change of the answers."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from pshare_jax.bench.machine import describe
from pshare_jax.convert.manifest import TOKENIZER_FOLDER
from pshare_jax.convert.orbax import open_weights
from pshare_jax.convert.seals import open_checkpoint
from pshare_jax.convert.streamed import Head, hidden_states
from pshare_jax.convert.tensors import DTYPES, LazyTensor
from pshare_jax.convert.verify import SAMPLE_PROMPTS, read_prompts
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.quantise import in_int8, quantise
from pshare_jax.models.weights import SCALE, weight_specs
from pshare_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Int8Options:
    """What is measured.

    Args:
        base: a prefill checkpoint.
        prompts: a file with one text a line, whose every position is looked at; empty for the
            sample prompts of `convert verify`.
        max_tokens: of each text.
    """

    base: str = "checkpoints/smollm2-135m"
    prompts: str = ""
    max_tokens: int = 256


def run(options: Int8Options) -> dict[str, Any]:
    """Bytes of the weights in both forms, and how far the next-token distributions are apart.

    Logits are computed in float32, so that only the rounding of weights counts.

    Raises:
        CheckpointError: no such checkpoint.
        ConfigError: its architecture has no weights of 8 bits.
    """
    manifest = open_checkpoint(options.base)
    config, int8 = manifest.config, in_int8(manifest.config)
    tokenizer = Tokenizer.load(manifest.folder / TOKENIZER_FOLDER)
    texts = read_prompts(options.prompts) if options.prompts else SAMPLE_PROMPTS
    encoded = [tokens for t in texts if (tokens := tokenizer.encode(t)[: options.max_tokens])]
    plain = open_weights(manifest)
    a, b = (_logits(config, tensors, encoded) for tensors in (plain, _rounded(int8, plain)))
    return {
        "options": asdict(options),
        "machine": describe(),
        "bfloat16_bytes": _bytes(config),
        "int8_bytes": _bytes(int8),
        "positions": len(a),
        "mean_kl": float(np.mean(_divergence(a, b))),
        "same_best": float(np.mean(a.argmax(-1) == b.argmax(-1))),
        "perplexity": [_perplexity(logits, encoded) for logits in (a, b)],
    }


def lines(result: dict[str, Any]) -> Sequence[str]:
    """The result as a Markdown table."""
    before, after = result["bfloat16_bytes"], result["int8_bytes"]
    perplexity = result["perplexity"]
    return (
        "| weights | MB | perplexity | mean KL (nats) | same most likely token |",
        "|---|---|---|---|---|",
        f"| bfloat16 | {before / 1e6:.1f} | {perplexity[0]:.3f} | | |",
        f"| int8 | {after / 1e6:.1f} | {perplexity[1]:.3f} | {result['mean_kl']:.2g} "
        f"| {result['same_best']:.1%} of {result['positions']} |",
    )


def _bytes(config: ModelConfig) -> int:
    """Of all weights, those without a dtype of their own in bfloat16."""
    size = {"int8": 1, "float32": 4, None: 2}
    return sum(math.prod(spec.shape) * size[spec.dtype] for spec in weight_specs(config).values())


def _rounded(int8: ModelConfig, plain: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The weights that whole numbers and scales stand for."""

    def read(name: str, tensor: LazyTensor) -> np.ndarray:
        found = quantise(int8, {name: jnp.asarray(tensor.read())})
        scale = found.get(name + SCALE)
        values = found[name].astype(jnp.float32)
        return np.asarray(values if scale is None else values * scale)

    return {
        name: LazyTensor(tensor.shape, DTYPES["float32"], functools.partial(read, name, tensor))
        for name, tensor in plain.items()
    }


def _logits(
    config: ModelConfig, tensors: Mapping[str, LazyTensor], encoded: Sequence[Sequence[int]]
) -> np.ndarray:
    return Head(config, tensors).logits(hidden_states(config, tensors, encoded))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def _divergence(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    x, y = _log_softmax(a), _log_softmax(b)
    return (np.exp(x) * (x - y)).sum(-1)


def _perplexity(logits: np.ndarray, encoded: Sequence[Sequence[int]]) -> float:
    losses: list[np.ndarray] = []
    start = 0
    for tokens in encoded:
        scores = _log_softmax(logits[start : start + len(tokens) - 1])
        losses.append(-scores[np.arange(len(scores)), tokens[1:]])
        start += len(tokens)
    return float(np.exp(np.mean(np.concatenate(losses))))
