"""A conversation as the server renders it, and the answers in it that are trained.

The server's own code makes the text (`frontend/chat.py`), so that a module is trained on the
prompts that it will get. What a chat template does not write of a trained answer is an error, and
of the rest a note: training goes on without it, as serving would.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pshare_jax.errors import DataError, RequestError
from pshare_jax.frontend.chat import (
    TemplateOptions,
    chat_messages,
    check_tools,
    render_chat,
    template_messages,
)
from pshare_jax.frontend.plain_text import PlainText
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.text.tools import in_openai_form

Turns = Literal["all", "last"]

_SEEN = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"}
_SEEN |= {"reasoning", "function_call", "weight", "train", "loss"}
_SWITCHES = ("train", "loss")
_LINKS = {"role", "tool_call_id"}
"""Fields that no text need show: the role is how a message is written."""


class LineError(DataError):
    """A line that cannot be trained on. `kind` is a word or two, for counting."""

    def __init__(self, message: str, kind: str = "not usable"):
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Turn:
    """An answer: tokens `start .. end - 1` of its example, the end token included.

    Args:
        start: of its first token.
        end: one behind its last.
        weight: of each of its tokens in the loss.
    """

    start: int
    end: int
    weight: float = 1.0


@dataclass(frozen=True)
class Part:
    """One sequence of a conversation: its tokens, and its trained turns in order."""

    tokens: list[int]
    turns: list[Turn]


class Conversation:
    """The messages of one line.

    Args:
        record: `{"messages": [...], "tools": [...]}`.
        tokenizer: the base's.
        options: how the server renders chats.

    Raises:
        LineError: something in it that cannot be used, by name.
        RequestError: what the server refuses too.
    """

    def __init__(
        self, record: Mapping[str, Any], tokenizer: Tokenizer, options: TemplateOptions
    ) -> None:
        given = record["messages"]
        if not isinstance(given, list) or not all(isinstance(m, dict) for m in given):
            raise LineError("messages is not a list of objects")
        if not given:
            raise LineError("messages is empty")
        self._tokenizer = tokenizer
        self._options = options
        self._plain = PlainText(tokenizer)
        self._messages = template_messages(chat_messages(given))
        self._tools = _tools(record.get("tools"))
        self._texts: dict[tuple[int, bool], str] = {}
        self.weights = [_weight(message, index) for index, message in enumerate(given)]
        """Of each message; 0 for what is no answer."""
        self.dropped = sorted(
            {
                f"messages[].{name}"
                for message in given
                for name, value in message.items()
                if name not in _SEEN and value is not None
            }
        )
        """What of the line no prompt shows, as `messages[].name`."""

    @property
    def asks(self) -> bool:
        """Whether it ends with something to be answered."""
        return self._messages[-1]["role"] != "assistant"

    def question(self) -> list[int]:
        """The prompt that the server would get of all messages."""
        prompt = self._encode(self._text(len(self._messages), ask=True))
        if not prompt:
            raise LineError("the prompt has no tokens", "no prompt")
        self._note_dropped(self._text(len(self._messages), ask=False), len(self._messages))
        return prompt

    def parts(self, turns: Turns, *, cut: bool = False) -> list[Part]:
        """The sequences that are trained: one, or one a turn where a turn's prompt does not begin
        with the turns before it.

        Args:
            turns: whether all answers are trained or the last one only.
            cut: the last answer was cut off: it gets no end token.

        Raises:
            LineError: nothing is left to train, or an answer that would not be trained as written.
        """
        answers = [i for i, m in enumerate(self._messages) if m["role"] == "assistant"]
        if not answers:
            raise LineError("messages has no assistant turn, so there is nothing to train")
        if turns == "last":
            answers = answers[-1:]
        trained = [index for index in answers if self.weights[index]]
        if not trained:
            raise LineError("every assistant turn has weight 0, so there is nothing to train")
        parts: list[Part] = []
        for index in trained:
            is_cut = cut and index == len(self._messages) - 1
            prompt, answer = self._turn(index, is_cut)
            turn = Turn(len(prompt), len(prompt) + len(answer), self.weights[index])
            if parts and prompt[: len(parts[-1].tokens)] == parts[-1].tokens:
                parts[-1] = Part(prompt + answer, [*parts[-1].turns, turn])
            else:
                parts.append(Part(prompt + answer, [turn]))
        self._note_dropped(self._text(trained[-1] + 1, ask=False), trained[-1] + 1)
        return parts

    def _turn(self, index: int, is_cut: bool) -> tuple[list[int], list[int]]:
        """Prompt and answer of the assistant's message `index`, tokenised apart, as in serving."""
        where = f"messages[{index}]"
        if index == 0:
            raise LineError(
                f"{where}: an assistant turn with nothing before it, which nobody can ask for; "
                'begin with a user message, or give the turn "weight": 0',
                "no prompt",
            )
        before = self._text(index, ask=True)
        after = self._text(index + 1, ask=False)
        if not after.startswith(before):
            raise LineError(
                f"{where}: the chat template does not write the answer after the prompt that it "
                "asks the answer with, so there is no prompt to train on",
                "no prompt",
            )
        self._check_answer(index, after)
        prompt = self._encode(before)
        if not prompt:
            raise LineError(f"{where}: the prompt has no tokens", "no prompt")
        answer = ended(self._encode(after[len(before) :]), self._tokenizer, is_cut)
        if is_blank(answer, self._tokenizer):
            raise LineError(
                f"{where}: the answer is empty or blank, so that its end alone would be trained; "
                'leave the line out, or give the turn "weight": 0',
                "empty answer",
            )
        return prompt, answer

    def _check_answer(self, index: int, after: str) -> None:
        """Checks that the template has written the calls of the answer that ends `after`."""
        message = self._messages[index]
        for key in ("name", "arguments"):
            calls = [_changed(call, key) for call in message.get("tool_calls", [])]
            changed = {**message, "tool_calls": calls}
            if calls != message.get("tool_calls", []) and self._is_same(
                after, index + 1, (index, changed)
            ):
                raise LineError(
                    f"messages[{index}]: the chat template does not write the {key} of its "
                    "tool_calls, so they would not be trained; write the calls into content in "
                    "the form that the model is to answer in",
                    "lost in the template",
                )

    def _note_dropped(self, text: str, count: int) -> None:
        """Notes which fields of the first `count` messages, and whether the tools, are not in
        their `text`."""
        dropped = set(self.dropped)
        for index, message in enumerate(self._messages[:count]):
            for name, value in message.items():
                if name in _LINKS or not value or self._shows(text, value):
                    continue
                other = [] if name == "tool_calls" else f"{value}?"
                changed = {**message, name: other}
                if self._is_same(text, count, (index, changed)):
                    dropped.add(f"messages[].{name} of {message['role']}")
                elif name == "content" and self.weights[index]:
                    dropped.add("a part of messages[].content of assistant")
        if self._tools and not all(self._shows(text, t["function"]["name"]) for t in self._tools):
            dropped.add("tools")
        self.dropped = sorted(dropped)

    def _is_same(self, text: str, count: int, instead: tuple[int, Mapping[str, Any]]) -> bool:
        """Whether `text` is that of the first `count` messages with another one, too; it is not
        where the template refuses that one."""
        try:
            return text == self._text(count, ask=False, instead=instead)
        except RequestError:
            return False

    def _shows(self, text: str, value: Any) -> bool:
        """Whether `value`, a text, is in `text`, as it is or as JSON; others are asked for by
        changing them."""
        if not isinstance(value, str):
            return False
        if not self._options.special_tokens:
            value = self._plain.hide(value)
        return value.strip() in text or json.dumps(value)[1:-1] in text

    def _text(
        self, count: int, *, ask: bool, instead: tuple[int, Mapping[str, Any]] | None = None
    ) -> str:
        """The first `count` messages rendered; `instead` takes the place of one of them."""
        if instead is None and (count, ask) in self._texts:
            return self._texts[count, ask]
        messages: list[Mapping[str, Any]] = list(self._messages[:count])
        if instead is not None:
            messages[instead[0]] = instead[1]
        options = replace(self._options, add_generation_prompt=ask)
        text = render_chat(self._tokenizer, messages, self._tools, options, self._plain)
        if instead is None:
            self._texts[count, ask] = text
        return text

    def _encode(self, text: str) -> list[int]:
        return self._plain.encode(text, False)


def ended(answer: Sequence[int], tokenizer: Tokenizer, is_cut: bool = False) -> list[int]:
    """`answer` up to its last end token; with one, when it has none.

    Args:
        answer: token ids.
        tokenizer: the base's.
        is_cut: the answer did not come to its end: it is given up to its last end token, without.

    Raises:
        LineError: there is no end token.
    """
    ends = [i for i, token in enumerate(answer) if token in tokenizer.eos_token_ids]
    if is_cut:
        return list(answer[: ends[-1]] if ends else answer)
    if ends:
        return list(answer[: ends[-1] + 1])
    if not tokenizer.eos_token_ids:
        raise LineError("the base's tokenizer names no end token, which an answer must end with")
    return [*answer, tokenizer.eos_token_ids[0]]


def is_blank(answer: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether an answer is nothing but white space and end tokens."""
    ids = [token for token in answer if token not in tokenizer.eos_token_ids]
    return not tokenizer.decode(ids, skip_special_tokens=False).strip()


def given_weight(fields: Mapping[str, Any], where: str) -> float | None:
    """The weight that `weight`, `train` and `loss` give to a message or a line; None without any.

    Raises:
        LineError: one of them is no weight, or no truth value.
    """
    weight: float | None = None
    if (value := fields.get("weight")) is not None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise LineError(f"{where}weight is {value!r}; it must be a number, 0 or more")
        if not math.isfinite(value):
            raise LineError(f"{where}weight is {value!r}; it must be finite")
        weight = float(value)
    for name in _SWITCHES:
        if (value := fields.get(name)) is None:
            continue
        if not isinstance(value, bool):
            raise LineError(f"{where}{name} is {value!r}; it must be true or false")
        weight = (1.0 if weight is None else weight) * value
    return weight


def _weight(message: Mapping[str, Any], index: int) -> float:
    weight = given_weight(message, f"messages[{index}]: ")
    if message.get("role") == "assistant":
        return 1.0 if weight is None else weight
    if weight:
        raise LineError(
            f"messages[{index}]: a message of role {message.get('role')} has a weight, but "
            "answers of the assistant alone are trained"
        )
    return 0.0


def _tools(tools: Any) -> list[dict[str, Any]]:
    if tools is None:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise LineError("tools is not a list of objects")
    wrapped = [in_openai_form(tool) for tool in tools]
    check_tools(wrapped)
    return wrapped


def _changed(call: Mapping[str, Any], key: str) -> dict[str, Any]:
    """`call` with another name, or with other arguments if it has any."""
    function = call["function"]
    value = function[key]
    if isinstance(value, dict):
        other: Any = dict.fromkeys(value, "changed")
    else:
        other = f"{value}_changed" if value else value
    return {**call, "function": {**function, key: other}}
