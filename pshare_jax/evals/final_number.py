"""Answers whose final number counts."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from pshare_jax.errors import DataError
from pshare_jax.evals.verdict import Grade, shorten

TOLERANCE = Fraction(1, 10**9)
"""Relative difference of numbers that are equal: generated references can carry rounding errors."""

_MAX_LENGTH = 60
_MAX_EXPONENT = 99
_UNSIGNED = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?"
# A minus after a digit, a letter or a bracket is an operator: 5-3, x-3, (2)-3.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)}}])-)?(?:[$€£]\s?(?P<inner>-)?)?(?P<number>{_UNSIGNED})"
    rf"(?:\s?/\s?(?P<denominator>{_UNSIGNED}))?"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?[\d.,]+)\s*\}\s*\{\s*(-?[\d.,]+)\s*\}")
_BOXED = re.compile(r"\\boxed\s*\{")


def check_reference(reference: Any) -> None:
    """Raises DataError unless `reference` is a number, as a text or as itself."""
    if isinstance(reference, bool) or not isinstance(reference, str | int | float):
        raise DataError('reference must be a number as a text, like "12.5", as kind is math')
    if final_number(str(reference)) is None:
        raise DataError(f"reference {shorten(str(reference))!r} holds no number, but kind is math")


def grade(reference: str | float, text: str) -> Grade:
    """Compares the final number of `text` with that of `reference`."""
    expected, given = final_number(str(reference)), final_number(text)
    assert expected is not None
    if given is None:
        return Grade(False, "no number in the answer")
    if abs(given - expected) <= TOLERANCE * max(abs(expected), abs(given)):
        return Grade(True, f"{_show(given)} is right")
    return Grade(False, f"{_show(given)} is not {_show(expected)}")


def final_number(text: str) -> Fraction | None:
    r"""The number that `text` ends on; what the last `\boxed{}` or `####` holds goes first.

    Reads "1,234", "$5", "-3", "3.0", "1e3", "3/4", "\frac{3}{4}"; a percent sign is no part of it.
    """
    text = text.replace("−", "-").replace("\\$", "$").replace("{,}", ",").replace("\\,", "")
    if numbers := _numbers(_boxed(text)):
        return numbers[-1]
    _, marker, rest = text.rpartition("####")
    if marker and (numbers := _numbers(rest)):
        return numbers[0]
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def _boxed(text: str) -> str:
    r"""What is inside the last `\boxed{...}`; the rest of the text when it is never closed."""
    starts = [match.end() for match in _BOXED.finditer(text)]
    if not starts:
        return ""
    depth = 1
    for index in range(starts[-1], len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[starts[-1] : index]
    return text[starts[-1] :]


def _numbers(text: str) -> list[Fraction]:
    plain = _FRACTION.sub(lambda match: f" {match[1]}/{match[2]} ", text)
    found = (_value(match) for match in _NUMBER.finditer(plain))
    return [number for number in found if number is not None]


def _value(match: re.Match[str]) -> Fraction | None:
    value = _fraction(match["number"])
    if value is not None and match["denominator"] is not None:
        denominator = _fraction(match["denominator"])
        value = value / denominator if denominator else None
    if value is None:
        return None
    return -value if match["sign"] or match["inner"] else value


def _fraction(number: str) -> Fraction | None:
    # Longer ones are no answers, and would take their time: 1e999999999.
    exponent = number.lower().partition("e")[2]
    if len(number) > _MAX_LENGTH or (exponent and abs(int(exponent)) > _MAX_EXPONENT):
        return None
    return Fraction(number.replace(",", ""))


def _show(value: Fraction) -> str:
    return str(value) if value.denominator == 1 else f"{float(value):.12g}"
