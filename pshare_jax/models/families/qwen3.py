"""Qwen3: norms on queries and keys in place of Qwen2's biases."""

from __future__ import annotations

from pshare_jax.models.families.qwen2 import Qwen2


class Qwen3(Qwen2):
    """See arXiv 2505.09388."""

    name = "qwen3"
    hf_architectures = ("Qwen3ForCausalLM",)
    model_type = "qwen3"
    head_dim = 128
    fixed = {"qk_norm": True}
    gguf = "qwen3"
    gguf_tensors = "QWEN3"


FAMILY = Qwen3()
