"""Reads one call in JSON, `{"name": "f", "arguments": {...}}`, while it is being written."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection

_SPACE = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")


class JsonCallReader:
    """Takes a call character by character, so that the result cannot depend on how it is cut.

    The name is told as soon as it is known and arguments have begun; then the arguments as the
    model writes them, but for control characters in texts, which are escaped. The object may be
    wrapped, `{"type": "function", "function": {...}}`, its keys may have any order, and arguments
    may be missing or JSON text in a string.

    Args:
        names: the names that a call may have; None for any.

    Attributes:
        name: the function's name, once it has been told.
        done: the object is complete, and was a call.
        failed: it is no call; if no name has been told, `raw` is ordinary text.
    """

    def __init__(self, names: Collection[str] | None = None):
        self._names = names
        self.name: str | None = None
        self.done = False
        self.failed = False
        self._raw: list[str] = []
        self._state: Callable[[str], None] = self._opening
        self._nested = False
        self._key = ""
        self._token: list[str] = []
        self._depth = 0
        self._quoted = False
        self._escaped = False
        self._read_name: str | None = None
        self._arguments: str | None = None
        self._told: list[str] = []

    @property
    def raw(self) -> str:
        """The text so far."""
        return "".join(self._raw)

    def push(self, text: str) -> tuple[int, str]:
        """Characters of `text` that belong to the object, and the arguments in them."""
        self._told.clear()
        taken = 0
        for char in text:
            if self.done or self.failed:
                break
            self._state(char)
            # What cannot belong to the object is left to the caller.
            if not self.failed:
                taken += 1
                self._raw.append(char)
        return taken, "".join(self._told)

    def _opening(self, char: str) -> None:
        if char == "{":
            self._state = self._before_key
        else:
            self.failed = True

    def _before_key(self, char: str) -> None:
        if char == '"':
            self._token, self._state = [char], self._in_key
        elif char == "}":
            self._end_object()
        elif char not in _SPACE:
            self.failed = True

    def _in_key(self, char: str) -> None:
        self._token.append(char)
        if self._ends_text(char):
            try:
                self._key = json.loads("".join(self._token))
            except ValueError:
                self.failed = True
            self._state = self._colon

    def _colon(self, char: str) -> None:
        if char == ":":
            self._state = self._before_value
        elif char not in _SPACE:
            self.failed = True

    def _before_value(self, char: str) -> None:
        if char in _SPACE:
            return
        if char == "{" and self._key == "function" and not self._nested:
            self._nested, self._state = True, self._before_key
            return
        self._token, self._depth, self._state = [], 0, self._in_value
        self._in_value(char)

    def _in_value(self, char: str) -> None:
        if self._quoted:
            self._take(char)
            if self._ends_text(char):
                self._quoted = False
                self._end_value_if_whole()
        elif char == '"':
            self._quoted = True
            self._take(char)
        elif char in "{[":
            self._depth += 1
            self._take(char)
        elif char in "}]" and self._depth:
            self._depth -= 1
            self._take(char)
            self._end_value_if_whole()
        elif self._depth == 0 and (char in "}]," or char in _SPACE):
            self._end_value()
            self._after_value(char)
        elif char == "<":
            self._meet_tag()
        else:
            self._take(char)

    def _meet_tag(self) -> None:
        """JSON has no `<` outside texts: a closing tag, where small models forget braces."""
        if self.name is not None and self._arguments is None and self._depth == 1:
            # Nothing else is open: the arguments are whole but for their own brace.
            self._told.append("}")
        self.failed = True

    def _after_value(self, char: str) -> None:
        if char == ",":
            self._state = self._before_key
        elif char == "}":
            self._end_object()
        elif char not in _SPACE:
            self.failed = True

    def _ends_text(self, char: str) -> bool:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        else:
            return char == '"'
        return False

    def _take(self, char: str) -> None:
        if self._quoted and char < " ":
            # Models write line breaks into texts as they are, which JSON does not allow.
            char = json.dumps(char)[1:-1]
        self._token.append(char)
        if self._key in _ARGUMENTS and self._arguments is None and self._token[0] == "{":
            if self.name is None:
                self._tell_name()
                if self.name is not None:
                    self._told += self._token
            else:
                self._told.append(char)

    def _tell_name(self) -> None:
        if self._read_name is None:
            return
        if self._names is not None and self._read_name not in self._names:
            self.failed = True
        else:
            self.name = self._read_name

    def _end_value_if_whole(self) -> None:
        if self._depth == 0:
            self._end_value()

    def _end_value(self) -> None:
        self._state = self._after_value
        if self._key in _ARGUMENTS and self._arguments is None:
            self._arguments = "".join(self._token)
        elif self._key == "name" and self._read_name is None:
            name = _loads("".join(self._token))
            if isinstance(name, str) and name:
                self._read_name = name
            else:
                self.failed = True

    def _end_object(self) -> None:
        if self._nested:
            self._nested, self._state = False, self._after_value
            return
        if self.name is None:
            self._tell_late()
        self.done = not self.failed

    def _tell_late(self) -> None:
        """A call whose arguments came before its name, or not as an object."""
        arguments = _as_object(self._arguments)
        if arguments is None or self._read_name is None:
            self.failed = True
            return
        self._tell_name()
        if self.name is not None:
            self._told.append(arguments)


def _as_object(text: str | None) -> str | None:
    """JSON text of arguments; None if they are no object, nor the text of one."""
    if text is None or text == "null":
        return "{}"
    value = _loads(text) if text.startswith('"') else text
    if value == "":
        return "{}"
    return value if isinstance(value, str) and value.lstrip().startswith("{") else None


def _loads(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
