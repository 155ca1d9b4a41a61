"""How Hugging Face folders are quantised: GPTQ, AWQ, FP8, compressed-tensors and MXFP4.

Each scheme stores a linear module's weight as several tensors; what they stand for is computed in
float32 when it is read.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pshare_jax.convert.eight_bits import EightBitWeight, scale_of_outputs
from pshare_jax.convert.tensors import INT8, NARROW, LazyTensor
from pshare_jax.models.hf_fields import Fields

Parts = Mapping[str, LazyTensor]
"""The tensors of one module by the last part of their names."""

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring columns each nibble of a word holds, the lowest nibble first."""


_FP4 = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
FP4_VALUES = np.concatenate([_FP4, -_FP4])
"""What the 16 nibbles of MXFP4 stand for."""


@dataclass(frozen=True)
class Scheme:
    """How weights are quantised.

    Args:
        title: for people.
        parts: last parts of names of what makes up a weight; the first is always there.
        shape: the weight's `[out, in]`, from the parts.
        weight: the weight, float32.
        dropped: last parts of names of what only activations or KV are rounded by.
        ending: what a weight's name has after its module's.
        separator: what stands before parts.
        eight_bits: the weight as one of 8 bits with a scale an output; None where it is none.
    """

    title: str
    parts: tuple[str, ...]
    shape: Callable[[Parts], tuple[int, ...]]
    weight: Callable[[Parts], np.ndarray]
    dropped: tuple[str, ...] = ()
    ending: str = ".weight"
    separator: str = "."
    eight_bits: Callable[[Parts], EightBitWeight | None] = lambda parts: None


def read_scheme(hf: Mapping[str, Any]) -> Scheme | None:
    """The scheme that a `config.json` states; None if its weights are not quantised.

    Raises:
        CheckpointError: names what is not supported.
    """
    if hf.get("quantization_config") is None:
        return None
    about = Fields(hf).part("quantization_config")
    method = about.values.get("quant_method")
    readers = {
        "gptq": _gptq,
        "awq": _awq,
        "fp8": _fp8,
        "compressed-tensors": _compressed,
        "mxfp4": _mxfp4,
    }
    if method not in readers:
        raise about.fail(
            "quant_method",
            f"is {reprlib.repr(method)}; supported are {', '.join(readers)}: convert the model "
            "that was quantised, or a GGUF file of it",
        )
    return readers[method](about)


def _unpacked(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Unsigned numbers that lie one after another in words of 32 bits, lowest bits first."""
    words = np.moveaxis(words.view(np.uint32), axis, -1)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    numbers = (words[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return np.moveaxis(numbers.reshape(*words.shape[:-1], -1), -1, axis).astype(np.float32)


def _bits(about: Fields, *supported: int) -> int:
    bits = about.positive("bits", int)
    if bits not in supported:
        raise about.fail("bits", f"is {bits}; supported are {', '.join(map(str, supported))}")
    return bits


def _gptq(about: Fields) -> Scheme:
    """`q [in, out]` in words along `in`, scales and zeros for groups of it (arXiv 2210.17323)."""
    bits = _bits(about, 2, 4, 8)
    about.only("checkpoint_format", "gptq", "gptq_v2")
    # The first form stores zeros less one.
    offset = 0 if about.values.get("checkpoint_format") == "gptq_v2" else 1

    def shape(parts: Parts) -> tuple[int, ...]:
        rows, out = parts["qweight"].shape
        return out, rows * 32 // bits

    def weight(parts: Parts) -> np.ndarray:
        numbers = _unpacked(parts["qweight"].read(), bits, 0)
        scales = parts["scales"].read().astype(np.float32)
        zeros = _unpacked(parts["qzeros"].read(), bits, 1) + offset
        inputs = len(numbers)
        if "g_idx" in parts:
            group = parts["g_idx"].read()
            if group.shape != (inputs,) or group.min() < 0:
                raise ValueError("g_idx gives no group for each input")
        else:
            group = np.arange(inputs) // (inputs // len(scales))
        return np.ascontiguousarray(((numbers - zeros[group]) * scales[group]).T)

    def eight_bits(parts: Parts) -> EightBitWeight | None:
        out, inputs = shape(parts)
        scale = scale_of_outputs(parts["scales"], out)
        if bits != 8 or parts["scales"].shape != (1, out) or scale is None:
            return None
        zeros = _unpacked(parts["qzeros"].read(), bits, 1) + offset
        if (zeros != 128).any() or ("g_idx" in parts and parts["g_idx"].read().any()):
            return None

        def numbers() -> np.ndarray:
            unsigned = _unpacked(parts["qweight"].read(), bits, 0)
            return np.ascontiguousarray((unsigned - 128).astype(np.int8).T)

        return EightBitWeight(LazyTensor((out, inputs), INT8, numbers), scale)

    parts = ("qweight", "qzeros", "scales", "g_idx")
    return Scheme(f"GPTQ, {bits} bits", parts, shape, weight, eight_bits=eight_bits)


def _awq(about: Fields) -> Scheme:
    """`q [in, out]` in words along `out`, in an order of its own (arXiv 2306.00978)."""
    name = "bits" if about.has("bits") else "w_bit"
    if (bits := about.positive(name, int)) != 4:
        raise about.fail(name, f"is {bits}; supported is 4")
    about.only("version", "gemm", "GEMM")
    about.only("zero_point", True)

    def numbers(words: np.ndarray) -> np.ndarray:
        nibbles = _unpacked(words, 4, 1).reshape(len(words), -1, 8)
        return nibbles[..., np.argsort(_AWQ_ORDER)].reshape(len(words), -1)

    def shape(parts: Parts) -> tuple[int, ...]:
        inputs, words = parts["qweight"].shape
        return words * 8, inputs

    def weight(parts: Parts) -> np.ndarray:
        values = numbers(parts["qweight"].read())
        scales = parts["scales"].read().astype(np.float32)
        zeros = numbers(parts["qzeros"].read())
        group = np.arange(len(values)) // (len(values) // len(scales))
        return np.ascontiguousarray(((values - zeros[group]) * scales[group]).T)

    return Scheme("AWQ, 4 bits", ("qweight", "qzeros", "scales"), shape, weight)


def _blocks(
    scales: np.ndarray, shape: tuple[int, ...], block: tuple[int, int] | None
) -> np.ndarray:
    """Scales of a whole weight, of rows, or of blocks, laid out over `[out, in]`."""
    scales = scales.astype(np.float32)
    if scales.size == 1:
        return scales.reshape(1, 1)
    if scales.ndim == 1:
        scales = scales[:, None]
    if block is None:
        # A scale for each output, or for groups of its inputs. No format has any along the inputs
        # alone, and `[1, out]` could be either where a weight is square.
        columns = scales.shape[-1]
        if scales.shape != (shape[0], columns) or not columns or shape[1] % columns:
            raise ValueError(
                f"scales of shape {list(scales.shape)} for {list(shape)} are neither one, nor some "
                "for each output, and no size of blocks is stated that would give as many"
            )
        block = 1, shape[1] // columns
    rows, columns = block
    if _count(shape, block) != scales.shape:
        raise ValueError(f"scales of shape {list(scales.shape)} for {list(shape)}")
    return scales.repeat(rows, 0).repeat(columns, 1)[: shape[0], : shape[1]]


def _count(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The number of blocks that cover each axis."""
    return tuple(math.ceil(n / m) for n, m in zip(shape, block, strict=True))


def _block(about: Fields, name: str) -> tuple[int, int] | None:
    """The size of blocks `[out, in]` that a field states, if it does."""
    block = about.values.get(name)
    if block is None:
        return None
    if not (
        isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)
    ):
        raise about.fail(name, f"is {reprlib.repr(block)}, not two sizes")
    return block[0], block[1]


_FP8_BLOCK = (128, 128)
"""Of `quant_method: fp8` where no other size is stated."""


def _fp8(about: Fields) -> Scheme:
    """FP8 with a scale for each block, as Qwen and DeepSeek have it, for each output or for all."""
    block = _block(about, "weight_block_size")

    def scales(parts: Parts) -> LazyTensor:
        return parts["weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"]

    def weight(parts: Parts) -> np.ndarray:
        values = parts["weight"].read().astype(np.float32)
        found = scales(parts).read()
        size = block
        if block is None and found.ndim == 2 and found.shape == _count(values.shape, _FP8_BLOCK):
            size = _FP8_BLOCK
        return values * _blocks(found, values.shape, size)

    def eight_bits(parts: Parts) -> EightBitWeight | None:
        return None if block else _of_rows(parts["weight"], scales(parts))

    parts = ("weight", "weight_scale_inv", "weight_scale")
    dropped = ("input_scale", "activation_scale")
    return Scheme("FP8", parts, _same_shape, weight, dropped, eight_bits=eight_bits)


def _of_rows(numbers: LazyTensor, scales: LazyTensor) -> EightBitWeight | None:
    """Numbers `[out, in]` of 8 bits and a scale for each row or all of them; None of others."""
    scale = scale_of_outputs(scales, numbers.shape[0])
    if scale is None or (len(scales.shape) == 2 and scales.shape[1] != 1):
        return None
    return EightBitWeight(numbers, scale) if numbers.dtype in NARROW else None


def _same_shape(parts: Parts) -> tuple[int, ...]:
    return parts["weight"].shape


def _compressed(about: Fields) -> Scheme:
    """compressed-tensors (LLM Compressor): FP8, INT8, and whole numbers packed into words."""
    groups = about.part("config_groups")
    forms = _compressed_forms(about, groups)
    weights = [
        groups.part(name).part("weights")
        for name in groups.values
        if groups.part(name).values.get("weights") is not None
    ]
    widths = {group.positive("num_bits", int) for group in weights}
    blocks = {_block(group, "block_structure") for group in weights} - {None}
    if len(blocks) > 1:
        raise about.fail("config_groups", "has blocks of several sizes, which is not supported")
    if "pack-quantized" in forms and (len(widths) != 1 or not widths <= {2, 4, 8}):
        raise about.fail(
            "config_groups", f"has weights of {sorted(widths)} bits; 2, 4 or 8 are supported"
        )
    read = _Compressed(next(iter(widths), 8), next(iter(blocks), None))
    title = f"compressed-tensors, {' and '.join(sorted(forms))}"
    parts = (
        "weight",
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
    )
    dropped = ("input_scale", "input_zero_point", "output_scale", "k_scale", "v_scale", "q_scale")
    return Scheme(title, parts, read.shape, read.weight, dropped, eight_bits=read.eight_bits)


def _compressed_forms(about: Fields, groups: Fields) -> set[str]:
    """The formats of all groups; sparse and rotated weights are refused."""
    supported = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
    stated = (about.values, *(groups.part(name).values for name in groups.values))
    forms = {values.get("format") for values in stated} - {None}
    if wrong := sorted(map(str, forms - set(supported))):
        raise about.fail("format", f"is {wrong[0]!r}; supported are {', '.join(supported)}")
    sparsity = about.part("sparsity_config").values.get("format")
    if sparsity not in (None, "dense"):
        raise about.fail("sparsity_config.format", f"is {reprlib.repr(sparsity)}; not supported")
    if about.part("transform_config").values.get("config_groups"):
        raise about.fail("transform_config", "rotates weights, which is not supported")
    return set(map(str, forms))


@dataclass(frozen=True)
class _Compressed:
    """Reads a weight of compressed-tensors.

    Args:
        bits: of a number that is packed into words.
        block: the size `[out, in]` of blocks, of those groups that have any.
    """

    bits: int
    block: tuple[int, int] | None

    def shape(self, parts: Parts) -> tuple[int, ...]:
        if "weight" in parts:
            return parts["weight"].shape
        out, words = parts["weight_packed"].shape
        if (stated := parts.get("weight_shape")) is None:
            return out, words * 32 // self.bits
        rows, columns = (int(n) for n in stated.read())
        if rows != out or not 0 < columns <= words * 32 // self.bits:
            raise ValueError("weight_shape is another shape")
        return rows, columns

    def weight(self, parts: Parts) -> np.ndarray:
        middle = 1 << (self.bits - 1)
        if "weight" in parts:
            values = parts["weight"].read().astype(np.float32)
        else:
            values = _unpacked(parts["weight_packed"].read(), self.bits, 1) - middle
            values = values[:, : self.shape(parts)[1]]
        scales = parts["weight_scale"].read()
        zeros: np.ndarray | None = None
        if "weight_zero_point" in parts:
            zeros = parts["weight_zero_point"].read()
            if zeros.dtype == np.int32:
                zeros = _unpacked(zeros, self.bits, 0)[: len(scales)] - middle
        if "weight_g_idx" in parts and (group := parts["weight_g_idx"].read()).min() >= 0:
            if zeros is not None:
                values = values - zeros.astype(np.float32)[:, group]
            return values * scales.astype(np.float32)[:, group]
        if zeros is not None:
            values = values - self._laid_out(zeros, values.shape)
        return values * self._laid_out(scales, values.shape)

    def _laid_out(self, scales: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        # Not every group has blocks.
        has_blocks = self.block and _count(shape, self.block) == scales.shape
        return _blocks(scales, shape, self.block if has_blocks else None)

    def eight_bits(self, parts: Parts) -> EightBitWeight | None:
        out, inputs = self.shape(parts)
        if "weight_zero_point" in parts:
            zeros = parts["weight_zero_point"].read()
            # In words a zero of 0 is the middle of what 8 bits are.
            if (zeros.view(np.uint8) != (128 if zeros.dtype == np.int32 else 0)).any():
                return None
        if "weight_g_idx" in parts and (parts["weight_g_idx"].read() > 0).any():
            return None
        if "weight" in parts:
            return _of_rows(parts["weight"], parts["weight_scale"])
        if self.bits != 8:
            return None

        def numbers() -> np.ndarray:
            unsigned = _unpacked(parts["weight_packed"].read(), 8, 1)
            return (unsigned - 128).astype(np.int8)[:, :inputs]

        return _of_rows(LazyTensor((out, inputs), INT8, numbers), parts["weight_scale"])


def _mxfp4(about: Fields) -> Scheme:
    """Blocks of 32 FP4 numbers along the inputs with a power of two each (OCP Microscaling).

    gpt-oss's experts: `[X, out, in]` as blocks, `[X, in, out]` as plain weights.
    """

    def shape(parts: Parts) -> tuple[int, ...]:
        *outer, out, groups, size = parts["blocks"].shape
        if size != 16 or parts["scales"].shape != (*outer, out, groups):
            raise ValueError("no blocks of 32")
        return *outer, groups * 32, out

    def weight(parts: Parts) -> np.ndarray:
        blocks, scales = parts["blocks"].read(), parts["scales"].read()
        both = np.stack([FP4_VALUES[blocks & 15], FP4_VALUES[blocks >> 4]], axis=-1)
        factors = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
        values = both.reshape(*scales.shape, 32) * factors[..., None]
        return values.reshape(*scales.shape[:-1], -1).swapaxes(-1, -2)

    return Scheme("MXFP4", ("blocks", "scales"), shape, weight, ending="", separator="_")
