"""Calls in JSON: Hermes and Qwen (in tags), Llama 3 (bare) and Mistral (after a special token)."""

from __future__ import annotations

from collections.abc import Collection

from pshare_jax.frontend.tool_calls.json_reader import JsonCallReader
from pshare_jax.frontend.tool_calls.parser import ToolParser, alphanumeric, begun

_SEPARATORS = " \t\r\n,;[]"


class JsonBlocks(ToolParser):
    """Calls one after the other, or in lists, from an opening tag to a closing one or the end.

    Attributes:
        opening: what announces calls; empty where an answer that starts with `{` is one.
        closing: what ends them; empty where nothing does.
    """

    opening = ""
    closing = ""

    def __init__(self, names: Collection[str]):
        super().__init__(names)
        self._step_now = self._outside
        self._reader: JsonCallReader | None = None
        # What has been read of the block since text or a call: text, if no call follows.
        self._block = ""

    def _step(self) -> bool:
        return self._step_now()

    def _outside(self) -> bool:
        opened = self._say_until(self.opening)
        if opened is None:
            return False
        self._block, self._step_now = opened, self._between
        return True

    def _between(self) -> bool:
        """After a tag or a call: another call, the closing tag, or text after all."""
        buffer = self._buffer
        if not buffer:
            self._give_up_at_end()
            return False
        if buffer[0] in _SEPARATORS and not (self.closing and buffer.startswith(self.closing)):
            self._block += self._take_separators()
        elif buffer[0] == "{":
            self._reader, self._step_now = JsonCallReader(self._allowed()), self._inside
        elif self.closing and buffer.startswith(self.closing):
            tag = self._take(len(self.closing))
            if self._block.strip(_SEPARATORS):  # no call was between the tags
                self._say(self._block + tag)
            self._leave()
        elif self.closing and self.closing.startswith(buffer) and not self._ended:
            return False
        else:
            return self._otherwise()
        return True

    def _take_separators(self) -> str:
        """Takes those at the start, up to what may be a tag: a model may write them without end."""
        run = len(self._buffer) - len(self._buffer.lstrip(_SEPARATORS))
        end = run
        for tag in filter(None, (self.opening, self.closing)):
            found = self._buffer.find(tag, 0, run + len(tag))
            end = min(end, found if found >= 0 else run - begun(self._buffer[:run], tag))
        return self._take(max(end, 1))

    def _otherwise(self) -> bool:
        """Neither a call nor an end of the block."""
        self._say(self._block)
        self._leave()
        return True

    def _leave(self) -> None:
        self._block, self._step_now = "", self._outside

    def _give_up_at_end(self) -> None:
        # White space and brackets after a call are no text.
        if self._ended and self._block.strip(_SEPARATORS):
            self._say(self._block)
        if self._ended:
            self._block = ""

    def _inside(self) -> bool:
        reader = self._reader
        assert reader is not None
        known = reader.name is not None
        taken, arguments = reader.push(self._buffer)
        self._take(taken)
        if reader.name is not None:
            if not known:
                self._block = ""
                self._start(reader.name)
            self._argue(arguments)
        if reader.done:
            self._reader, self._step_now = None, self._between
        elif reader.failed or self._ended:
            self._reader = None
            if reader.name is not None and self.closing:
                # Small models forget the last brace; the closing tag is no text even so.
                self._step_now = self._between
            else:
                if reader.name is None:
                    self._say(self._block + reader.raw)
                self._leave()
        else:
            return False
        return True

    def _allowed(self) -> Collection[str] | None:
        """The names that a call may have here; None for any."""
        return None


class Hermes(JsonBlocks):
    """`<tool_call>{"name": "f", "arguments": {...}}</tool_call>`: Hermes 2, Qwen 2.5 and 3."""

    opening = "<tool_call>"
    closing = "</tool_call>"
    style = "hermes"
    markers = (opening, closing)


class Llama3Json(JsonBlocks):
    """An answer that is `{"name": "f", "parameters": {...}}`, or several: Llama 3.1 and 3.2.

    Nothing announces a call, so JSON is one only if it names a function that there is.
    """

    opening = "<|python_tag|>"
    style = "llama3_json"
    markers = (opening,)

    def __init__(self, names: Collection[str]):
        super().__init__(names)
        self._step_now = self._start_of_answer

    def _start_of_answer(self) -> bool:
        text = self._buffer.lstrip()
        if not self._ended and (not text or (self.opening.startswith(text))):
            return False
        if text.startswith(self.opening):
            self._step_now = self._outside
        elif text.startswith("{"):
            self._block = self._take(len(self._buffer) - len(text))
            self._step_now = self._between
        else:
            self._step_now = self._plain
        return True

    def _leave(self) -> None:
        self._block, self._step_now = "", self._plain

    def _plain(self) -> bool:
        self._say(self._take(len(self._buffer)))
        return False

    def _allowed(self) -> Collection[str] | None:
        return self.names


class Mistral(JsonBlocks):
    """`[TOOL_CALLS][{"name": "f", "arguments": {...}}]`, or the newer `[TOOL_CALLS]f[ARGS]{...}`,
    with `[CALL_ID]` and an id before the arguments in between.

    Their chat templates want ids of nine letters and digits.
    """

    opening = "[TOOL_CALLS]"
    style = "mistral"
    _ARGS = "[ARGS]"
    _ID = "[CALL_ID]"
    markers = (opening, _ARGS, _ID)
    _NAME_ENDS = "[{"

    @classmethod
    def call_id(cls, name: str) -> str:
        """Nine letters and digits."""
        return alphanumeric(name, 9)

    def _between(self) -> bool:
        if self._buffer.startswith(self.opening):
            if self._block.lstrip().startswith(self.opening):  # no call came after the last one
                self._say(self._block)
            self._block = self._take(len(self.opening))
            return True
        if self.opening.startswith(self._buffer) and self._buffer and not self._ended:
            return False
        return super()._between()

    def _otherwise(self) -> bool:
        """A name, perhaps an id, and then its arguments."""
        end = next((i for i, char in enumerate(self._buffer) if char in self._NAME_ENDS), -1)
        after = self._arguments(self._buffer[end:]) if end >= 0 else None
        if after is None and not self._ended:
            # A name has no spaces: what has is text, which need not wait.
            if not any(char.isspace() for char in self._buffer.strip()):
                return False
            return super()._otherwise()
        name = self._buffer[:end].strip() if end >= 0 else ""
        if not name or any(char.isspace() for char in name):
            return super()._otherwise()
        if after is None or not after.startswith("{"):
            return super()._otherwise()
        # As if the model had written the older form.
        self._buffer = f'{{"name": {_quoted(name)}, "arguments": {after}'
        self._reader, self._step_now = _Unclosed(), self._inside
        return True

    def _arguments(self, rest: str) -> str | None:
        """What comes after a name's id and tag; None while it is still to come."""
        if rest.startswith(self._ID):
            start = len(self._ID)
            end = next((i for i in range(start, len(rest)) if rest[i] in self._NAME_ENDS), -1)
            if end < 0:
                return None
            if any(char.isspace() for char in rest[start:end]):
                return ""  # nor has an id
            rest = rest[end:]
        elif self._ID.startswith(rest):
            return None
        if self._ARGS.startswith(rest):
            return None
        return rest.removeprefix(self._ARGS).lstrip() or None


def _quoted(name: str) -> str:
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'


class _Unclosed(JsonCallReader):
    """Ends with its arguments: the object around them is not written."""

    def _end_value(self) -> None:
        super()._end_value()
        if self._arguments is not None:
            self._end_object()
