"""What every parser of tool calls is: text goes in as it is generated, parts come out."""

from __future__ import annotations

import hashlib
import string
from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any

from pshare_jax.frontend.tool_calls.parts import CallArguments, CallStart, Part, Text
from pshare_jax.plain_data import is_mapping


class ToolParser(ABC):
    """Splits the text of one answer into text and calls.

    The parts add up to the same however the text is cut into pieces, and text that turns out to be
    no call comes out unchanged. White space around calls is dropped.

    Args:
        names: the functions that may be called, and the JSON schemas of their parameters if those
            are known.

    Attributes:
        schemas: of parameters, by function.
        markers: special tokens that the format consists of, which the text must show.
        style: the form of calls that `grammars.calls_grammar` writes; empty where they cannot be
            forced.
    """

    markers: tuple[str, ...] = ()
    style = ""

    def __init__(self, names: Collection[str]):
        self.names = frozenset(names)
        self.schemas: dict[str, Any] = dict(names) if is_mapping(names) else {}
        self._buffer = ""
        self._ended = False
        self._calls = 0
        self._parts: list[Part] = []

    def push(self, text: str) -> list[Part]:
        """The parts that are certain after `text`."""
        self._buffer += text
        while self._step():
            pass
        parts, self._parts = self._parts, []
        return parts

    def finish(self) -> list[Part]:
        """The rest, when the text has ended."""
        self._ended = True
        return self.push("")

    @classmethod
    def call_id(cls, name: str) -> str:
        """The id of a call, as clients and chat templates of the family expect it.

        `name` says which call it is, of which answer: nobody else's is the same.
        """
        return f"call_{hashlib.blake2b(name.encode(), digest_size=12).hexdigest()}"

    @abstractmethod
    def _step(self) -> bool:
        """Takes something off the buffer; False when more text is needed."""

    def _take(self, count: int) -> str:
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def _take_all(self, characters: str) -> str:
        """Takes the characters at the start that are among these."""
        return self._take(len(self._buffer) - len(self._buffer.lstrip(characters)))

    def _say(self, text: str) -> None:
        if text:
            self._parts.append(Text(text))

    def _start(self, name: str) -> None:
        self._parts.append(CallStart(self._calls, name))
        self._calls += 1

    def _argue(self, text: str) -> None:
        if text:
            self._parts.append(CallArguments(self._calls - 1, text))

    def _say_until(self, *tags: str) -> str | None:
        """Says the text before the first of `tags`; takes the tag if it is there.

        What may yet become a tag, and white space that may stand before it, is held back.

        Returns:
            The white space and the tag: text, if no call follows. None if there is no tag.
        """
        found = [(at, tag) for tag in tags if (at := self._buffer.find(tag)) >= 0]
        if found:
            at, tag = min(found)
            self._say(self._take(len(self._buffer[:at].rstrip())))
            return self._take(self._buffer.index(tag) + len(tag))
        if self._ended:
            self._say(self._take(len(self._buffer)))
            return None
        certain = len(self._buffer) - max(begun(self._buffer, tag) for tag in tags)
        self._say(self._take(len(self._buffer[:certain].rstrip())))
        return None


def begun(text: str, tag: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `tag`."""
    for length in range(min(len(text), len(tag) - 1), 0, -1):
        if tag.startswith(text[-length:]):
            return length
    return 0


def alphanumeric(name: str, length: int) -> str:
    """Letters and digits that a name gives, and that look random; at most 24 of them."""
    letters = string.ascii_letters + string.digits
    number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=24).digest())
    found = ""
    for _ in range(length):
        number, rest = divmod(number, len(letters))
        found += letters[rest]
    return found
