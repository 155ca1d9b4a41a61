"""Tiny models for the conversion tests."""

from __future__ import annotations

import numpy as np

from pshare_jax.convert.tensors import DTYPES
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.weights import WeightSpec, weight_specs

TINY = ModelConfig(
    architecture="llama",
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=8,
    num_kv_heads=8,
    head_dim=16,
    tie_word_embeddings=False,
)

TOKENIZER_FILES = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}


def random_tensors(
    specs: dict[str, WeightSpec], seed: int = 0, dtype: str = "float32"
) -> dict[str, np.ndarray]:
    """Normal values for `specs`, in numpy."""
    rng = np.random.default_rng(seed)
    return {
        name: (0.05 * rng.standard_normal(spec.shape, dtype=np.float32)).astype(DTYPES[dtype])
        for name, spec in specs.items()
    }


def random_weights(config: ModelConfig = TINY, seed: int = 0, dtype: str = "float32"):
    """Random full weights of `config`."""
    return random_tensors(weight_specs(config), seed, dtype)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays agree in dtype, shape and every bit."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
