"""The forms that weights can have in memory: which have 8 bits, and of what dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pshare_jax.models.config import WeightFormat


@dataclass(frozen=True)
class EightBits:
    """A form in which kernels have 8 bits, and float32 scales, one for each output.

    Args:
        dtype: name of the kernels' dtype.
        head: whether an output head of its own is such a kernel.
        tied_embedding: whether an embedding that is the head too is one, with a scale a token.
        rounds: whether what kernels multiply is rounded to 8 bits as well.
    """

    dtype: str
    head: bool = True
    tied_embedding: bool = False
    rounds: bool = False


_INT8 = EightBits("int8")
_FP8 = EightBits("float8_e4m3fn")

_FORMS: dict[WeightFormat, EightBits] = {
    "int8": _INT8,
    "int8-layers": replace(_INT8, head=False),
    "int8-dynamic": replace(_INT8, tied_embedding=True, rounds=True),
    "fp8": _FP8,
    "fp8-layers": replace(_FP8, head=False),
}


def eight_bits(form: WeightFormat) -> EightBits | None:
    """What has 8 bits in a form; None of `plain`."""
    return _FORMS.get(form)


def rounds(form: WeightFormat) -> bool:
    """Whether products of a form round what they read to 8 bits."""
    return form in _FORMS and _FORMS[form].rounds
