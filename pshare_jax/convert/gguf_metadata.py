"""The hyper-parameters of a GGUF file: typed, checked, and without the architecture in the name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

from pshare_jax.errors import CheckpointError
from pshare_jax.models.rope import (
    LinearRopeScaling,
    RopeScaling,
    YarnRopeScaling,
    yarn_attention_factor,
)


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

    def fail(self, key: str, problem: str) -> CheckpointError:
        """An error about a key."""
        return CheckpointError(f"{self._file.path}: metadata {self._scope}.{key} {problem}")

    def has(self, key: str) -> bool:
        """Whether it is there."""
        return self._file.has(f"{self._scope}.{key}")

    def optional(self, key: str, kind: type, default: Any) -> Any:
        """A value of type `kind`, or the default."""
        return self._file.get(f"{self._scope}.{key}", kind, default)

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        if (value := self._file.get(f"{self._scope}.{key}", int, default)) < 1:
            raise self.fail(key, f"is {value}, but must be positive")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self._file.get(f"{self._scope}.{key}", float, default)
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
