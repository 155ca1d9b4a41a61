"""Gemma: Llama with GeGLU, norms that multiply by 1 + weight, and scaled embeddings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from pshare_jax.models.config import ModelConfig
from pshare_jax.models.family import Family, GGUFMetadata
from pshare_jax.models.hf_fields import Fields

GELU_TANH = "gelu_pytorch_tanh"


class Gemma(Family):
    """See arXiv 2403.08295."""

    name = "gemma"
    hf_architectures = ("GemmaForCausalLM",)
    model_type = "gemma"
    max_position_embeddings = 8192
    num_kv_heads = 16
    head_dim = 256
    tie_word_embeddings = True
    fixed = {"norm_adds_one": True, "activation": "gelu_tanh"}
    only = {
        # "gelu" is an old name for the same in Gemma's configurations.
        "hidden_act": (GELU_TANH, "gelu"),
        "hidden_activation": (GELU_TANH,),
        "attention_bias": (False,),
        "partial_rotary_factor": (1.0,),
        "use_bidirectional_attention": (False,),
    }
    gguf = "gemma"
    gguf_tensors = "GEMMA"

    def options(self, fields: Fields, hidden_size: int, head_dim: int) -> dict[str, Any]:
        """Embeddings are as large as hidden states."""
        return {"embedding_scale": math.sqrt(hidden_size)}

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """transformers reads one of the names in Gemma, the other one later."""
        return {"hidden_act": GELU_TANH, "hidden_activation": GELU_TANH}

    def config_from_gguf(self, config: ModelConfig, metadata: GGUFMetadata) -> ModelConfig:
        """GGUF does not write the embeddings' scale."""
        return replace(config, embedding_scale=math.sqrt(config.hidden_size))

    def weight_from_gguf(self, native: str, array: np.ndarray, config: ModelConfig) -> np.ndarray:
        """GGUF stores the norms' factors, 1 + weight."""
        return array - 1 if native.endswith(".scale") else array


FAMILY = Gemma()
