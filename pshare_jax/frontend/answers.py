"""An answer's text as thoughts, content and calls."""

from __future__ import annotations

from pshare_jax.frontend.reasoning import ReasoningSplitter
from pshare_jax.frontend.tool_calls.parser import ToolParser
from pshare_jax.frontend.tool_calls.parts import CallArguments, CallStart, Part, Reasoning, Text


class AnswerReader:
    """Takes the text of one answer in pieces and gives its parts.

    Args:
        reasoning: splits thoughts off; None where a model has none.
        tools: finds calls in the rest; None where none can be made.
        one_call: drops all calls but the first.

    Attributes:
        calls: how many calls there have been.
    """

    def __init__(
        self,
        reasoning: ReasoningSplitter | None = None,
        tools: ToolParser | None = None,
        one_call: bool = False,
    ):
        self._reasoning = reasoning
        self._tools = tools
        self._one_call = one_call
        self.calls = 0

    def push(self, text: str) -> list[Part]:
        """The parts that are certain after `text`."""
        return self._read(self._split(text))

    def finish(self) -> list[Part]:
        """The rest, when the text has ended."""
        parts = self._read(self._reasoning.finish()) if self._reasoning is not None else []
        if self._tools is not None:
            parts += self._count(self._tools.finish())
        return parts

    def _split(self, text: str) -> list[Part]:
        if self._reasoning is not None:
            return self._reasoning.push(text)
        return [Text(text)] if text else []

    def _read(self, parts: list[Part]) -> list[Part]:
        if self._tools is None:
            return parts
        read: list[Part] = []
        for part in parts:
            read += self._count(self._tools.push(part.text)) if isinstance(part, Text) else [part]
        return read

    def _count(self, parts: list[Part]) -> list[Part]:
        if self._one_call:
            parts = [p for p in parts if isinstance(p, Text | Reasoning) or p.index == 0]
        self.calls += sum(isinstance(part, CallStart) for part in parts)
        return parts


def joined(parts: list[Part]) -> tuple[str, str, list[tuple[str, str]]]:
    """Thoughts, content and calls (name, JSON text of the arguments) of a whole answer."""
    reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
    content = "".join(part.text for part in parts if isinstance(part, Text))
    names = [part.name for part in parts if isinstance(part, CallStart)]
    arguments = [""] * len(names)
    for part in parts:
        if isinstance(part, CallArguments):
            arguments[part.index] += part.text
    return reasoning, content, list(zip(names, arguments, strict=True))
