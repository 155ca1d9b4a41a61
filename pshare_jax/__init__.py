"""PrefillShare in JAX: one frozen prefill module, many fine-tuned decode modules, one KV cache."""

__version__ = "0.1.0"
