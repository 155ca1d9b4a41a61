"""Calls in Python's syntax: `f(a=1)` or `[f(a=1), g(b="x")]`.

Llama 3.2 and 4 write the latter, the trained `tools` module of this repository the former.
"""

from __future__ import annotations

import json
from collections.abc import Collection

from pshare_jax.frontend.tool_calls.parser import ToolParser
from pshare_jax.frontend.tool_calls.syntax import CallSyntaxError, python_calls

_BETWEEN = " \t\r\n,;"
_QUOTES = "'\""


class Pythonic(ToolParser):
    """An answer that starts with a call of a function that there is, in a list or bare.

    OpenAI's names have no dots, Python's modules do: a dot in the text may stand for an underscore
    in the name. A call comes out when its parenthesis closes: only then its arguments are certain.
    """

    style = "pythonic"

    def __init__(self, names: Collection[str]):
        super().__init__(names)
        self._spelled = {name.replace(".", "_"): name for name in self.names}
        self._step_now = self._before_call
        self._skipped = ""
        self._scan = _CallScanner()

    def _step(self) -> bool:
        return self._step_now()

    def _before_call(self) -> bool:
        """White space, an opening bracket, then a name and a parenthesis."""
        separators = _BETWEEN + ("]" if self._calls else "[")
        if self._buffer and self._buffer[0] in separators:
            self._skipped += self._take_all(separators)
            return True
        name, opened, _ = self._buffer.partition("(")
        spelled = name.strip().replace(".", "_")
        if opened and spelled in self._spelled:
            self._scan = _CallScanner()
            self._step_now = self._in_call
            return True
        begins = any(known.startswith(spelled) for known in self._spelled)
        if not opened and begins and not self._ended:
            return False
        if self._buffer or not self._calls:
            # White space after a call is no text; other text keeps what stood before it.
            self._say(self._skipped + self._take(len(self._buffer)))
        self._skipped, self._step_now = "", self._plain
        return bool(self._buffer)

    def _in_call(self) -> bool:
        end = self._scan.end(self._buffer)
        if end is None and not self._ended:
            return False
        source = self._take(len(self._buffer) if end is None else end)
        if end is None or not self._tell(source):
            self._say(self._skipped + source)
            self._skipped, self._step_now = "", self._plain
        else:
            self._skipped, self._step_now = "", self._before_call
        return True

    def _tell(self, source: str) -> bool:
        try:
            (call,) = python_calls(source)
            arguments = json.dumps(call.arguments, ensure_ascii=False, allow_nan=False)
        except (CallSyntaxError, ValueError, RecursionError, MemoryError):
            return False
        self._start(self._spelled[call.name.replace(".", "_")])
        self._argue(arguments)
        return True

    def _plain(self) -> bool:
        self._say(self._take(len(self._buffer)))
        return False


class _CallScanner:
    """Finds the parenthesis that closes a call, a character at a time."""

    def __init__(self) -> None:
        self._position = 0
        self._depth = 0
        self._quote = ""
        self._escaped = False

    def end(self, text: str) -> int | None:
        """The position after the call that starts `text`; None when it goes on.

        Args:
            text: that of the last time, or that with more at its end.
        """
        while self._position < len(text):
            char = text[self._position]
            self._position += 1
            if self._quote:
                self._in_quotes(char)
            elif char in _QUOTES:
                self._quote = char
            elif char in "([{":
                self._depth += 1
            elif char in ")]}":
                self._depth -= 1
                if self._depth <= 0:
                    return self._position
        return None

    def _in_quotes(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == self._quote:
            self._quote = ""
