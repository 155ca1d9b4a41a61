"""Kind exact: texts compared as people would."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pshare_jax.errors import DataError
from pshare_jax.evals import exact


@pytest.mark.parametrize(
    "text",
    [
        "son-in-law",
        "Son-in-law.",
        "  SON-IN-LAW\n",
        "**son-in-law**",
        "“Son-in-law!”",
        "`son-in-law`",
    ],
)
def test_case_space_and_surrounding_punctuation_do_not_count(text):
    assert exact.grade("son-in-law", text).correct


@pytest.mark.parametrize("text", ["son", "son in law", "soninlaw", "son-in-law, yes", "", "..."])
def test_other_texts_are_wrong(text):
    grade = exact.grade("son-in-law", text)
    assert not grade.correct
    assert "is not 'son-in-law'" in grade.detail


def test_compatibility_characters_and_inner_space():
    assert exact.grade("new york", "Ｎｅｗ\u00a0\n York").correct
    assert exact.grade("straße", "STRASSE").correct


@pytest.mark.parametrize("reference", ["", " .,", None, 3, ["a"]])
def test_a_reference_needs_a_text(reference):
    with pytest.raises(DataError, match="reference must be a text"):
        exact.check_reference(reference)


@given(st.text())
def test_normalising_twice_changes_nothing(text):
    once = exact.normalise(text)
    assert exact.normalise(once) == once
