"""The hyper-parameters of a GGUF file: typed, checked, and without the architecture in the name."""

from __future__ import annotations

import math
import reprlib
from pathlib import Path
from typing import Any, Protocol

from pshare_jax.errors import CheckpointError
from pshare_jax.models.rope import (
    LinearRopeScaling,
    RopeScaling,
    YarnRopeScaling,
    yarn_attention_factor,
)

WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "router_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "interleave_moe_layer_step": (0, 1),
    "moe_every_n_layers": (0, 1),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "swiglu_clamp_exp": (0.0,),
    "use_parallel_residual": (False,),
    "rope.scaling.alpha": (0.0, 1.0),
}
"""Metadata that change results, and their values that do not: of an architecture that knows nothing
of one, another value is refused."""


class _File(Protocol):
    path: Path

    def get(self, key: str, kind: type, default: Any = None) -> Any: ...

    def has(self, key: str) -> bool: ...

    def has_tensor(self, name: str) -> bool: ...


class Metadata:
    """What `family.GGUFMetadata` asks for.

    Args:
        file: the GGUF file.
        scope: its name of the architecture, which stands before every key.
    """

    def __init__(self, file: _File, scope: str):
        self._file = file
        self._scope = scope
        self._read: set[str] = set()

    def fail(self, key: str, problem: str) -> CheckpointError:
        """An error about a key."""
        return CheckpointError(f"{self._file.path}: metadata {self._scope}.{key} {problem}")

    def has(self, key: str) -> bool:
        """Whether it is there."""
        return self._file.has(self._key(key))

    def _key(self, key: str) -> str:
        self._read.add(key)
        return f"{self._scope}.{key}"

    def check_unread(self) -> None:
        """Makes sure that nothing has been passed over that changes results.

        Raises:
            CheckpointError: names it.
        """
        for key, neutral in WITHOUT_EFFECT.items():
            name = f"{self._scope}.{key}"
            if key in self._read or not self._file.has(name):
                continue
            value = self._file.get(name, object)
            if value not in neutral:
                raise self.fail(key, f"is {reprlib.repr(value)}, which is not supported")

    def optional(self, key: str, kind: type, default: Any) -> Any:
        """A value of type `kind`, or the default."""
        return self._file.get(self._key(key), kind, default)

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        if (value := self._file.get(self._key(key), int, default)) < 1:
            raise self.fail(key, f"is {value}, but must be positive")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self._file.get(self._key(key), float, default)
        if not 0 < value < math.inf:
            raise self.fail(key, f"is {value}, but must be positive")
        return value

    def heads(self) -> int:
        """Query heads."""
        return self.size("attention.head_count")

    def has_tensor(self, name: str) -> bool:
        """Whether the file has a tensor of that name."""
        return self._file.has_tensor(name)


def stated_rope_scaling(metadata: Metadata) -> RopeScaling | None:
    """The scaling that the metadata state, as llama.cpp computes it.

    Raises:
        CheckpointError: names one that is not supported.
    """
    if metadata.number("rope.scale_linear", 1.0) != 1.0:
        raise metadata.fail("rope.scale_linear", "is not supported; convert the file anew")
    kind = metadata.optional("rope.scaling.type", str, "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise metadata.fail(
            "rope.scaling.type", f"is {kind!r}; supported are 'none', 'linear' and 'yarn'"
        )
    factor = metadata.number("rope.scaling.factor")
    if kind == "linear":
        return LinearRopeScaling(factor)
    for key in ("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_log_multiplier"):
        if metadata.has(key):
            raise metadata.fail(key, "is not supported")
    attention_factor = yarn_attention_factor(factor)
    for key in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"):
        attention_factor *= metadata.number(key, 1.0)
    return YarnRopeScaling(
        factor,
        metadata.size("rope.scaling.original_context_length", metadata.size("context_length")),
        attention_factor,
        metadata.number("rope.scaling.yarn_beta_fast", 32.0),
        metadata.number("rope.scaling.yarn_beta_slow", 1.0),
    )
