"""Whether data from outside is an object or a list; type checkers learn of what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard


def is_object(data: Any) -> TypeGuard[dict[str, Any]]:
    """Whether it is a JSON object, whose keys are texts, as a parser has made it."""
    return isinstance(data, dict)


def is_mapping(data: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether it is a JSON object, in whatever form."""
    return isinstance(data, Mapping)


def is_list(data: Any) -> TypeGuard[list[Any]]:
    """Whether it is a JSON array."""
    return isinstance(data, list)


def is_sequence(data: Any) -> TypeGuard[Sequence[Any]]:
    """Whether it is a JSON array, in whatever form; a text is one, too."""
    return isinstance(data, Sequence)
