"""Answers that are a given text."""

from __future__ import annotations

import unicodedata
from typing import Any

from pshare_jax.errors import DataError
from pshare_jax.evals.verdict import Grade, shorten


def check_reference(reference: Any) -> None:
    """Raises DataError unless `reference` is a text with more than punctuation in it."""
    if not isinstance(reference, str) or not normalise(reference):
        raise DataError("reference must be a text of which letters or digits remain, as kind exact")


def grade(reference: str, text: str) -> Grade:
    """Compares two texts without case, surplus white space and surrounding punctuation."""
    given = normalise(text)
    if given == normalise(reference):
        return Grade(True, "equal")
    return Grade(False, f"{shorten(given)!r} is not {normalise(reference)!r}")


def normalise(text: str) -> str:
    """Case folded, compatibility characters unified, white space single, no punctuation around."""
    words = unicodedata.normalize("NFKC", text).casefold().split()
    line = " ".join(words)
    start, end = 0, len(line)
    while start < end and _is_outer(line[start]):
        start += 1
    while end > start and _is_outer(line[end - 1]):
        end -= 1
    return line[start:end]


def _is_outer(character: str) -> bool:
    # Punctuation, and the symbols that Markdown and typing errors put around an answer.
    return (
        character.isspace() or unicodedata.category(character).startswith("P") or character in "`^~"
    )
