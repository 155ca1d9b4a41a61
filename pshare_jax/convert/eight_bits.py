"""Weights that a source has in 8 bits, kept as they are.

That is possible where each output of every projection has one scale and its zero is 0: such a
weight is one of `weights: int8` or `weights: fp8` already (`models.quantise`), with no rounding but
the source's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from pshare_jax.convert.names import hf_sources, native_outputs, read_native
from pshare_jax.convert.tensors import DTYPES, LazyTensor
from pshare_jax.models.config import ModelConfig, WeightFormat
from pshare_jax.models.weights import SCALE, narrow_specs, weight_specs

KEPT: dict[WeightFormat, str] = {
    "int8": "whole numbers of 8 bits, a scale for each output",
    "int8-layers": "whole numbers of 8 bits, a scale for each output; a plain head",
    "fp8": "FP8 numbers (e4m3), a scale for each output",
    "fp8-layers": "FP8 numbers (e4m3), a scale for each output; a plain head",
}
"""Forms that a checkpoint may have beside `plain`, for people; the first that fits counts."""


@dataclass(frozen=True)
class EightBitWeight:
    """A weight of Hugging Face's layout.

    Args:
        numbers: `[out, in]` of one of `tensors.NARROW`.
        scale: `[out]` float32.
    """

    numbers: LazyTensor
    scale: LazyTensor


def scale_of_outputs(scales: LazyTensor, outputs: int) -> LazyTensor | None:
    """One float32 scale for each output, of as many or of one; None of others."""
    if math.prod(scales.shape) not in (1, outputs) or len(scales.shape) > 2:
        return None

    def read() -> np.ndarray:
        values = scales.read().astype(np.float32).reshape(-1)
        return np.ascontiguousarray(np.broadcast_to(values, (outputs,)))

    return LazyTensor((outputs,), DTYPES["float32"], read)


def native_eight_bits(
    config: ModelConfig, found: Mapping[str, EightBitWeight]
) -> dict[str, LazyTensor]:
    """Kernels and their scales by native name, of those that all of is found.

    Args:
        config: the architecture.
        found: by Hugging Face name; of the shapes that `config` implies.
    """
    # Those of any form have the same shapes.
    specs = weight_specs(config.with_weights("int8"))
    kept: dict[str, LazyTensor] = {}
    for native, names in hf_sources(config).items():
        if len(names) != 1 or names[0] not in found or native + SCALE not in specs:
            continue
        of, shape = found[names[0]], specs[native + SCALE].shape
        numbers = partial(read_native, native, config, lambda _, of=of: of.numbers.read())
        scale = partial(_scale, native, config, names[0], of, shape)
        kept[native] = LazyTensor(specs[native].shape, of.numbers.dtype, numbers)
        kept[native + SCALE] = LazyTensor(shape, DTYPES["float32"], scale)
    return kept


def _scale(
    native: str, config: ModelConfig, name: str, of: EightBitWeight, shape: tuple[int, ...]
) -> np.ndarray:
    return native_outputs(native, config, name, of.scale.read()).reshape(shape)


def form_of(config: ModelConfig, found: Mapping[str, LazyTensor]) -> WeightFormat:
    """In which form a checkpoint can keep what `native_eight_bits` gives; `plain` if in none."""
    if config.has_experts:
        return "plain"
    for form in KEPT:
        needed = narrow_specs(config.with_weights(form)).items()
        if all(name in found and found[name].dtype.name == spec.dtype for name, spec in needed):
            return form
    return "plain"


def stood_for(numbers: LazyTensor, scale: LazyTensor) -> LazyTensor:
    """What a kernel `[*in, *out]` of 8 bits stands for, float32; its scale is `[*out]`."""

    def read() -> np.ndarray:
        return numbers.read().astype(np.float32) * scale.read()

    return LazyTensor(numbers.shape, DTYPES["float32"], read)


def as_stored(
    config: ModelConfig, tensors: Mapping[str, LazyTensor], found: Mapping[str, LazyTensor]
) -> tuple[Mapping[str, LazyTensor], WeightFormat]:
    """What a checkpoint stores of a full module's `tensors`, some of them as `found`; its form."""
    form = form_of(config, found)
    if form == "plain":
        return tensors, form
    specs = weight_specs(config.with_weights(form))
    return {n: found[n] if spec.dtype else tensors[n] for n, spec in specs.items()}, form
