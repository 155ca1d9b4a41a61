"""Calls in tags of their own, which Qwen 3 Coder and its kin write.

```
<tool_call>
<function=f>
<parameter=a>
1
</parameter>
</function>
</tool_call>
```

Values are bare text; what they are in JSON is for the schemas of the function's parameters to say.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from pshare_jax.frontend.tool_calls.parser import ToolParser, begun
from pshare_jax.frontend.tool_calls.xml_values import is_text, value_json

_OPENING, _CLOSING = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_SPACE = " \t\r\n"


class XmlBlocks(ToolParser):
    """Reads such calls.

    A text for a parameter is told while it is written, other values when they are complete. A value
    may hold tags: it ends where what follows goes on with the call.
    """

    style = "qwen3_coder"
    markers = (_OPENING, _CLOSING)

    def __init__(self, names: Collection[str]):
        super().__init__(names)
        self._step_now = self._outside
        # What has been read of the block since text or a call: text, if no call follows.
        self._block = ""
        self._tagged = self._called = False
        self._schema: Mapping[str, Any] = {}
        self._key = ""
        self._keys = 0
        self._value = ""
        self._value_begun = False
        self._is_text = True

    def _step(self) -> bool:
        return self._step_now()

    def _outside(self) -> bool:
        """Text, until a tag; some models leave the outer one out."""
        opened = self._say_until(_OPENING, _FUNCTION)
        if opened is None:
            return False
        self._called, self._tagged = False, opened.endswith(_OPENING)
        self._block, self._step_now = opened, self._between
        if not self._tagged:
            self._block = opened.removesuffix(_FUNCTION)
            self._buffer = _FUNCTION + self._buffer
        return True

    def _between(self) -> bool:
        """After the outer tag or a call: a call, the closing tag, or text after all."""
        buffer = self._buffer
        if not buffer:
            if self._ended:
                self._give_up("")
            return False
        if buffer[0] in _SPACE:
            self._block += self._take(len(buffer) - len(buffer.lstrip(_SPACE)))
            return True
        if buffer.startswith(_CLOSING):
            self._give_up(self._take(len(_CLOSING)))
            return True
        if buffer.startswith(_FUNCTION) and self._function():
            return True
        if buffer.startswith(_OPENING):
            self._give_up("")
            return True
        if not self._ended and self._undecided(_FUNCTION, _CLOSING, _OPENING):
            return False
        text = self._take(1)
        self._give_up(text)
        if self._called:
            self._say(text)
        return True

    def _give_up(self, text: str) -> None:
        """Ends a block; without a call all of it, and `text` after it, is text."""
        if not self._called:
            self._say(self._block + text)
        self._block, self._step_now = "", self._outside

    def _function(self) -> bool:
        """Begins a call, if the tag at the start of the buffer is whole and names one."""
        name = self._tag_name(_FUNCTION)
        if not name or not (self._tagged or name.strip() in self.names):
            return False
        self._take(len(_FUNCTION) + len(name) + 1)
        self._block, self._keys, self._called = "", 0, True
        self._schema = self.schemas.get(name.strip()) or {}
        self._start(name.strip())
        self._argue("{")
        self._step_now = self._inside
        return True

    def _inside(self) -> bool:
        """Between the parameters of a call; what is no tag there means nothing."""
        buffer = self._buffer
        if buffer.startswith(_PARAMETER) and (key := self._tag_name(_PARAMETER)):
            self._take(len(_PARAMETER) + len(key) + 1)
            self._key, self._value, self._value_begun = key.strip(), "", False
            # Once, since a client's schema may be large.
            self._is_text = is_text(self._schema, self._key)
            self._argue((", " if self._keys else "") + json.dumps(self._key, ensure_ascii=False))
            self._argue(": " + ('"' if self._is_text else ""))
            self._keys += 1
            self._step_now = self._in_value
            return True
        for tag in (_FUNCTION_END, _CLOSING):
            if buffer.startswith(tag):
                # The outer tag is left to what comes after a call.
                self._take(len(tag) if tag == _FUNCTION_END else 0)
                self._argue("}")
                self._step_now = self._between
                return True
        undecided = self._undecided(_PARAMETER, _FUNCTION_END, _CLOSING)
        if not buffer or (undecided and not self._ended):
            return False
        self._take(max(buffer.find("<", 1), 0) or len(buffer))
        return True

    def _in_value(self) -> bool:
        """A parameter's value; the line breaks next to its tags are not of it."""
        if not self._value_begun:
            if not self._buffer and not self._ended:
                return False
            self._take(self._buffer.startswith("\n"))
            self._value_begun = True
        certain, tag = self._value_end()
        text = self._take(certain)
        self._tell_value(text)
        if tag is None:
            if self._ended and not self._is_text:
                self._argue(self._value)
            return False
        self._take(self._buffer.startswith("\n"))
        self._take(len(tag) if tag == _PARAMETER_END else 0)
        if self._is_text:
            self._argue('"')
        else:
            self._argue(value_json(self._value, self._schema, self._key))
        self._step_now = self._inside
        return True

    def _tell_value(self, text: str) -> None:
        if self._is_text:
            self._argue(json.dumps(text, ensure_ascii=False)[1:-1])
        else:
            self._value += text

    def _value_end(self) -> tuple[int, str | None]:
        """How much of the buffer is certainly the value's, and the tag that ends it, if one does.

        A line break before what may be the end is not certain.
        """
        buffer, start = self._buffer, 0
        while True:
            ends = [
                (at, tag)
                for tag in (_PARAMETER_END, _FUNCTION_END)
                if (at := buffer.find(tag, start)) >= 0
            ]
            if not ends:
                break
            at, tag = min(ends)
            ending = self._ends_value(tag, buffer[at + len(tag) :].lstrip(_SPACE))
            if ending is not False:
                before = at - (at > 0 and buffer[at - 1] == "\n")
                return before, tag if ending else None
            start = at + 1
        if self._ended:
            return len(buffer), None
        held = max(begun(buffer, tag) for tag in (_PARAMETER_END, _FUNCTION_END))
        certain = len(buffer) - held
        return certain - (certain > 0 and buffer[certain - 1] == "\n"), None

    def _ends_value(self, tag: str, rest: str) -> bool | None:
        """Whether `tag` ends the value, by what follows it; None when that is still to come."""
        after = (_PARAMETER, _FUNCTION_END, _CLOSING) if tag == _PARAMETER_END else (_CLOSING,)
        if any(rest.startswith(follower) for follower in after):
            return True
        if any(follower.startswith(rest) for follower in after):
            return (not rest) if self._ended else None
        return False

    def _tag_name(self, tag: str) -> str:
        """The name in `<tag=name>` at the start of the buffer; empty if there is none."""
        name, closed, _ = self._buffer[len(tag) :].partition(">")
        return name if closed and name.strip() and "\n" not in name and "<" not in name else ""

    def _undecided(self, *tags: str) -> bool:
        """Whether the buffer may yet become one of `tags`, with its name if it has one."""
        buffer = self._buffer
        if any(tag.startswith(buffer) for tag in tags):
            return True
        for tag in tags:
            if tag.endswith("=") and buffer.startswith(tag):
                name = buffer[len(tag) :]
                return not any(char in name for char in ">\n<")
        return False
