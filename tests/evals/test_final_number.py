"""Kind math: the final number of an answer."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pshare_jax.errors import DataError
from pshare_jax.evals.final_number import check_reference, final_number, grade


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234", 1234),
        ("It costs $5.", 5),
        ("-3", -3),
        ("-$5", -5),
        ("$-5", -5),
        ("3.0", 3),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        ("3 / 4", Fraction(3, 4)),
        ("-1/2", Fraction(-1, 2)),
        ("1e3", 1000),
        ("25%", 25),
        ("x = −7", -7),
        ("5-3", 3),
        ("5-3=2", 2),
        ("7 - 2", 2),
        ("first 12, then 5", 5),
        ("1,234,567.5 people", Fraction(2469135, 2)),
        ("5 * 2 = 10\n#### 10 apples, not 12", 10),
        ("#### -1,000", -1000),
        ("#### none, so 4", 4),
        (r"\boxed{42} as 6 * 7", 42),
        (r"\boxed{\frac{3}{4}}", Fraction(3, 4)),
        (r"\boxed{x = \dfrac{-3}{4}} or 7", Fraction(-3, 4)),
        (r"\boxed{1} no: \boxed{2", 2),
        (r"\$1{,}000", 1000),
        ("none", None),
        ("1/0", None),
        ("1e999999999", None),
        ("9" * 5000, None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


def test_grade():
    assert grade("1234", "so 1,234.00").correct
    assert grade("0.3", "0.30000000000000004").correct
    assert grade(18, "#### 18").correct
    wrong = grade("12", "the answer is 13")
    assert (wrong.correct, wrong.detail) == (False, "13 is not 12")
    assert grade("12", "twelve").detail == "no number in the answer"
    assert not grade("0", "0.001").correct


@pytest.mark.parametrize("reference", ["twelve", "", None, True, [1]])
def test_a_reference_needs_a_number(reference):
    with pytest.raises(DataError, match="number"):
        check_reference(reference)


@given(st.integers(-(10**30), 10**30), st.text("abc .!?\n"))
def test_any_number_is_found(number, words):
    assert final_number(f"{words} {number:,}{words}") == number
    assert final_number(f"17 {words} \\boxed{{{number}}} 4 {words}") == number


@given(st.decimals(-(10**9), 10**9, places=4))
def test_decimals(number):
    assert final_number(f"= {number:f}") == Fraction(number)


@given(st.text("0123456789.,-/eE#$\\boxed{} ", max_size=60))
def test_no_text_is_an_error(text):
    grade("1", text)
