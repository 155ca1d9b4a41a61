"""Prefill fingerprints: names of everything that the KV of a prefill module depends on.

A fingerprint is the SHA-256 of a canonical form of configuration, weights and tokenizer. The form
has a version. Of the configuration it holds what KV depends on and is not as by default: a new
field with a default changes no fingerprint. So a default, once released, may not change.
Certificates and manifests may state a fingerprint of an earlier version: `former_fingerprints`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pshare_jax.models.config import ModelConfig
from pshare_jax.models.rope import Llama3RopeScaling

VERSION = 2

_NOT_READ = ("max_position_embeddings",)
"""Fields that no computation depends on."""

_FIELDS_OF_VERSION_1 = (
    "architecture",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "rope_theta",
    "rope_scaling",
    "rms_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
    "qkv_bias",
    "qk_norm",
    "sliding_window",
)


def prefill_fingerprint(
    config: ModelConfig, tensor_hashes: Mapping[str, str], tokenizer_hash: str
) -> str:
    """The name of everything that a prefill module's KV depends on: SHA-256 in hex.

    Args:
        config: the architecture.
        tensor_hashes: `split.tensor_hash` of each weight by name; their order does not matter.
        tokenizer_hash: hash of the tokenizer's files, any format.
    """
    fields = _without_defaults(config)
    return _digest(
        {
            "version": VERSION,
            "config": {name: value for name, value in fields.items() if name not in _NOT_READ},
            "tensors": dict(tensor_hashes),
            "tokenizer": tokenizer_hash,
        }
    )


def former_fingerprints(
    config: ModelConfig, tensor_hashes: Mapping[str, str], tokenizer_hash: str
) -> tuple[str, ...]:
    """What earlier versions called the same module; arguments as for `prefill_fingerprint`.

    Version 1 held every field of the configuration. A module that needs a later field had no name
    then.
    """
    known = set(_without_defaults(config)) <= set(_FIELDS_OF_VERSION_1)
    if not known or not isinstance(config.rope_scaling, Llama3RopeScaling | None):
        return ()
    fields = dataclasses.asdict(config)
    version_1 = {
        "config": {name: fields[name] for name in _FIELDS_OF_VERSION_1},
        "tensors": dict(tensor_hashes),
        "tokenizer": tokenizer_hash,
    }
    return (_digest(version_1),)


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _without_defaults(values: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not as by default, those of dataclasses in it likewise."""
    return {
        field.name: _canonical(value)
        for field in dataclasses.fields(values)
        if (value := getattr(values, field.name)) != field.default
    }


def _canonical(value: Any) -> Any:
    """Equal numbers are written alike: 500000.0 as 500000."""
    if isinstance(value, tuple):
        return [_canonical(entry) for entry in value]
    if dataclasses.is_dataclass(value):
        kind = getattr(value, "rope_type", "llama3")
        # Llama 3.1's was there before there were others, and says nothing of its type.
        return _without_defaults(value) | ({} if kind == "llama3" else {"rope_type": kind})
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
