"""`verify A B`: how far the logits of two models are apart on sample prompts."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from pshare_jax.convert.files import one_line, write_files
from pshare_jax.convert.inspection import check_hashes
from pshare_jax.convert.manifest import MANIFEST_FILE
from pshare_jax.convert.orbax import load_weights, read_tokenizer_files
from pshare_jax.convert.sources import open_source
from pshare_jax.errors import CertificateError, CheckpointError
from pshare_jax.models.attention import CausalAttention
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.decoder import bind
from pshare_jax.models.lora import LoraModule, merge
from pshare_jax.models.split import Certificate
from pshare_jax.models.weights import Weights
from pshare_jax.text.tokenizer import Tokenizer

SAMPLE_PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Question: A train covers 120 km in 1.5 hours. How fast does it go?\nAnswer:",
    '{"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}',
    "Il était une fois, dans un petit village, 一只猫 🐈 and a dog.",
)

MAX_TOKENS = 512
"""Longer prompts are cut: the comparison needs many positions, not long ones."""


@dataclass(frozen=True)
class Model:
    """A full model ready to compute logits; weights are float32."""

    config: ModelConfig
    weights: Weights
    tokenizer_files: Mapping[str, bytes]


@dataclass(frozen=True)
class Difference:
    """Of two models' logits, over all positions of all prompts.

    Args:
        largest: largest absolute difference of a logit.
        mean_kl: mean over positions of KL(A || B) of the next-token distributions, in nats.
        positions: number of positions compared.
    """

    largest: float
    mean_kl: float
    positions: int


def load_model(path: str | Path, base: str | Path | None = None) -> Model:
    """Loads a checkpoint, or anything that can be imported, in float32.

    Args:
        path: what to load; the hashes of a checkpoint are checked.
        base: the prefill checkpoint of a decode module; a LoRA module is merged into it.

    Raises:
        CheckpointError: it cannot be loaded, or is a LoRA module without `base`.
        CertificateError: `base` is not its base.
    """
    if not (Path(path) / MANIFEST_FILE).is_file():
        source = open_source(path).astype("float32")
        weights = {name: jnp.asarray(tensor.read()) for name, tensor in source.tensors.items()}
        return Model(source.config, weights, source.tokenizer_files)
    manifest = check_hashes(path)
    weights = load_weights(manifest, dtype=jnp.float32)
    if manifest.certificate is None:
        return Model(manifest.config, weights, read_tokenizer_files(manifest))
    files: Mapping[str, bytes] = {}
    if base is not None:
        prefill = check_hashes(base)
        if prefill.fingerprint != manifest.certificate.prefill_fingerprint:
            raise CertificateError(f"{base}: is not the base that {path} was made for")
        files = read_tokenizer_files(prefill)
    if manifest.certificate.kind == "lora":
        if base is None:
            raise CheckpointError(f"{path}: is a LoRA module; name its base with --base")
        module = _lora_module(manifest.certificate, weights)
        weights = merge(load_weights(base, dtype=jnp.float32), module)
    return Model(manifest.config, weights, files)


def _lora_module(certificate: Certificate, weights: Weights) -> LoraModule:
    assert certificate.lora_rank is not None
    assert certificate.lora_alpha is not None
    assert certificate.lora_targets is not None
    return LoraModule(
        weights, certificate.lora_alpha, certificate.lora_rank, certificate.lora_targets
    )


def read_prompts(path: str | Path) -> list[str]:
    """One prompt a line; empty lines do not count.

    Raises:
        CheckpointError: no such file, not UTF-8, or no prompts.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {one_line(error)}") from error
    if not (prompts := [line for line in lines if line.strip()]):
        raise CheckpointError(f"{path}: has no prompts")
    return prompts


def compare(a: Model, b: Model, prompts: Sequence[str] = SAMPLE_PROMPTS) -> Difference:
    """Compares the logits of `a` and `b` at every position of `prompts`.

    Raises:
        CheckpointError: vocabularies of different size, or no tokenizer in either.
    """
    if a.config.vocab_size != b.config.vocab_size:
        raise CheckpointError(
            f"vocabularies of {a.config.vocab_size} and {b.config.vocab_size} tokens: "
            "the logits cannot be compared"
        )
    tokenizer = _tokenizer(a.tokenizer_files or b.tokenizer_files)
    largest, kl, positions = 0.0, 0.0, 0
    for prompt in prompts:
        tokens = tokenizer.encode(prompt)[:MAX_TOKENS]
        if not tokens:
            continue
        # Lengths are padded to powers of two to compile few shapes; attention is causal.
        padded = np.zeros((1, 1 << (len(tokens) - 1).bit_length()), np.int32)
        padded[0, : len(tokens)] = tokens
        pair = (_logits(model.config, model.weights, padded)[0] for model in (a, b))
        for x, y in zip(*(np.asarray(logits)[: len(tokens)] for logits in pair), strict=True):
            # numpy's maximum keeps a NaN, Python's max would lose it.
            largest = float(np.maximum(largest, np.max(np.abs(x - y))))
            kl += _divergence(x, y)
        positions += len(tokens)
    return Difference(largest, kl / max(positions, 1), positions)


def _tokenizer(files: Mapping[str, bytes]) -> Tokenizer:
    if not files:
        raise CheckpointError("neither model has a tokenizer; name the base with --base")
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), files)
        return Tokenizer.load(folder)


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, weights: Weights, tokens: jax.Array) -> jax.Array:
    decoder = bind(config, weights)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return decoder.logits(decoder.hidden(tokens, positions, CausalAttention(config)))


def _divergence(a: np.ndarray, b: np.ndarray) -> float:
    """KL(a || b) in nats of two logit vectors; float32 would round small ones below zero."""
    log_a, log_b = (x - scipy.special.logsumexp(x) for x in (a.astype(float), b.astype(float)))
    return float(np.sum(np.exp(log_a) * (log_a - log_b)))
