"""What an answer is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """A piece of what the user is told."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """A piece of what the model has thought before."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """Call `index` of the answer, counted from 0, begins."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A piece of the JSON text of call `index`'s arguments."""

    index: int
    text: str


Part = Text | Reasoning | CallStart | CallArguments
