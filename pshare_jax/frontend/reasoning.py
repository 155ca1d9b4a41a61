"""Splits what a model thinks, `<think>...</think>`, from what it answers (Qwen 3, DeepSeek R1)."""

from __future__ import annotations

from pshare_jax.frontend.tool_calls.parser import begun
from pshare_jax.frontend.tool_calls.parts import Part, Reasoning, Text

OPENING, CLOSING = "<think>", "</think>"


class ReasoningSplitter:
    """Takes the text of one answer in pieces; the parts do not depend on how it is cut.

    Thoughts come first or not at all. White space around the tags is dropped.

    Args:
        begun: whether the prompt has opened the tag, as some chat templates do.
    """

    def __init__(self, begun: bool):
        self._step = self._thinking if begun else self._start
        self._buffer = ""
        self._ended = False
        self._leading = begun
        self._parts: list[Part] = []

    def push(self, text: str) -> list[Part]:
        """The parts that are certain after `text`."""
        self._buffer += text
        while self._step():
            pass
        parts, self._parts = self._parts, []
        return parts

    def finish(self) -> list[Part]:
        """The rest, when the text has ended; thoughts that were cut off stay thoughts."""
        self._ended = True
        return self.push("")

    def _start(self) -> bool:
        text = self._buffer.lstrip()
        if not self._ended and len(text) < len(OPENING) and OPENING.startswith(text):
            return False
        if text.startswith(OPENING):
            self._buffer = text[len(OPENING) :]
            self._step, self._leading = self._thinking, True
        else:
            self._step = self._answering
        return True

    def _thinking(self) -> bool:
        if self._leading:
            self._buffer = self._buffer.lstrip()
            self._leading = not self._buffer
        end = self._buffer.find(CLOSING)
        if end >= 0:
            self._think(self._buffer[:end].rstrip())
            self._buffer = self._buffer[end + len(CLOSING) :]
            self._step, self._leading = self._answering, True
            return True
        certain = len(self._buffer) - begun(self._buffer, CLOSING)
        keep = len(self._buffer) if self._ended else len(self._buffer[:certain].rstrip())
        self._think(self._buffer[:keep])
        self._buffer = self._buffer[keep:]
        return False

    def _answering(self) -> bool:
        if self._leading:
            self._buffer = self._buffer.lstrip()
            self._leading = not self._buffer
        if self._buffer:
            self._parts.append(Text(self._buffer))
            self._buffer = ""
        return False

    def _think(self, text: str) -> None:
        if text:
            self._parts.append(Reasoning(text))
