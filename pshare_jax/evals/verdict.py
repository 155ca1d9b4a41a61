"""What grading an answer gives."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Grade:
    """Whether an answer is right, and in a few words why or why not."""

    correct: bool
    detail: str


def shorten(text: str, length: int = 200) -> str:
    """`text` on one line of at most `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 3]}..."
