"""The tensors of quantised Hugging Face folders, dequantised or as they are.

Weights that have 8 bits, whole numbers or FP8 ones, with one scale an output can be had as such.
Activations, which some schemes round too, are not rounded here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np

from pshare_jax.convert.eight_bits import EightBitWeight
from pshare_jax.convert.schemes import Parts, Scheme
from pshare_jax.convert.tensors import DTYPES, FP8, LazyTensor
from pshare_jax.errors import CheckpointError


def plain_tensors(scheme: Scheme, stored: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors of a folder by the names that they would have without quantisation.

    Args:
        scheme: how they are quantised.
        stored: what the folder holds, as it is.

    Raises:
        CheckpointError: a part of a weight is missing.
    """
    modules, plain = _modules(scheme, stored)
    for module, parts in modules.items():
        name = module + scheme.ending
        if set(parts) == {"weight"} and parts["weight"].dtype.name in DTYPES:
            # A module that was left as it is.
            plain[name] = parts["weight"]
            continue
        try:
            shape = scheme.shape(parts)
        except (KeyError, ValueError, ZeroDivisionError) as error:
            have = ", ".join(sorted(parts))
            raise CheckpointError(
                f"tensors {module}.*: {have} are no weight of {scheme.title}"
            ) from error
        read = functools.partial(_read, name, scheme, parts, shape)
        plain[name] = LazyTensor(shape, DTYPES["float32"], read)
    return plain


def eight_bit_weights(
    scheme: Scheme, stored: Mapping[str, LazyTensor]
) -> dict[str, EightBitWeight]:
    """The weights that have 8 bits and one scale an output, by name.

    Arguments as of `plain_tensors`; weights whose parts do not fit together are not among them.
    """
    found: dict[str, EightBitWeight] = {}
    for module, parts in _modules(scheme, stored)[0].items():
        try:
            weight = scheme.eight_bits(parts)
        except (KeyError, ValueError, IndexError):
            continue
        if weight is not None:
            found[module + scheme.ending] = weight
    return found


def _modules(
    scheme: Scheme, stored: Mapping[str, LazyTensor]
) -> tuple[dict[str, dict[str, LazyTensor]], dict[str, LazyTensor]]:
    """Parts of weights by their modules, and all else that counts."""
    others: dict[str, LazyTensor] = {}
    modules: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in stored.items():
        module, part = _split(name, scheme)
        if part in scheme.dropped:
            continue
        if part in scheme.parts:
            modules.setdefault(module, {})[part] = _checked(name, part, tensor)
        else:
            others[name] = tensor
    return modules, others


def _checked(name: str, part: str, tensor: LazyTensor) -> LazyTensor:
    """FP8 numbers and scales, which are refused where one is not finite; all else as it is."""
    if tensor.dtype.kind in "iu" or (part == "weight" and tensor.dtype != FP8):
        return tensor

    def read() -> np.ndarray:
        values = tensor.read()
        if len(where := np.argwhere(~np.isfinite(values))):
            raise CheckpointError(
                f"tensor {name}: is {values[tuple(where[0])]} at {where[0].tolist()}; the source "
                "is damaged, or was not quantised well"
            )
        return values

    return LazyTensor(tensor.shape, tensor.dtype, read)


def _split(name: str, scheme: Scheme) -> tuple[str, str]:
    for part in sorted((*scheme.parts, *scheme.dropped), key=len, reverse=True):
        if name.endswith(scheme.separator + part):
            return name[: -len(part) - 1], part
    return name, ""


def _read(name: str, scheme: Scheme, parts: Parts, shape: tuple[int, ...]) -> np.ndarray:
    try:
        weight = scheme.weight(parts)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"tensor {name}: its parts do not fit together: {error}") from error
    if weight.shape != shape:
        raise CheckpointError(f"tensor {name}: its parts make up {list(weight.shape)}")
    return weight
