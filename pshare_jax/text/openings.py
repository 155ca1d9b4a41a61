"""How a user or tool message begins in a base's chat template, in token ids.

The split rule `last-message` looks for these sequences (`core/split_rule.py`). They are derived
once, when a decode module is trained or converted, and are part of its certificate from then on.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence

from pshare_jax.core.split_rule import LAST_MESSAGE, LastMessage, SplitRule, TailSetting, parse_rule
from pshare_jax.errors import CertificateError, CheckpointError, RequestError
from pshare_jax.text.tokenizer import Message, Tokenizer

Openings = tuple[tuple[int, ...], ...]

_BEFORE = "Beforehand"
_MARK = "Markedly"
_CONTENTS = (
    *("Question", "user", "a", "Z", "1", "007", "é", "日本", "🙂", "_", '"x"', "{}", "[]", "<x>"),
    *("'s", "(x)", ":", "/x", ">", "]", "-", " x", "  x", "\tx", "\nx", "\n\nx", "\r\nx"),
    "\u0301x",
)
"""Texts that begin unlike each other: what tokenizers merge with the end of an opening differs."""
_ANSWERS = (_BEFORE, "yes.", "1", "é", "日本", "🙂", "}", "]", ">", "x ", "x\n")
"""Texts that end unlike each other: what stands before an opening must not reach into it."""
_ARGUMENTS = (_BEFORE, "yes.", "1")
_TOOL: Message = {"role": "tool", "name": "lookup", "tool_call_id": "call00001"}


def split_rule(setting: TailSetting, tokenizer: Callable[[], Tokenizer]) -> SplitRule:
    """The split rule that a configuration's or command line's `tail` asks for.

    Args:
        setting: a number of tokens, `last-message`, or `{"invocation": token ids}`.
        tokenizer: gives the base's; asked only where its chat template matters.

    Raises:
        CertificateError: none of these.
        CheckpointError: `message_openings` cannot tell how a message begins.
    """
    if setting == LAST_MESSAGE:
        return LastMessage(message_openings(tokenizer()))
    try:
        return parse_rule(setting)
    except ValueError as error:
        raise CertificateError(str(error)) from error


def message_openings(tokenizer: Tokenizer) -> Openings:
    """The token ids that begin a user message, and those of a tool message where they differ.

    An opening is as long as it is the same whatever message follows: a tokenizer may merge the end
    of the template's text with the first character of the message. Templates without tool messages
    have one opening, and so have those that write a tool's answer as a user's.

    Raises:
        CheckpointError: there is no chat template; or its messages do not begin with token ids that
            are always the same and begin nothing else.
    """
    if not tokenizer.has_chat_template:
        raise CheckpointError(
            f"tail: {LAST_MESSAGE} needs a chat template, which the base does not have; give a "
            "number of tokens"
        )
    try:
        openings = [_opening(tokenizer, _answered, _ANSWERS, {"role": "user"})]
        if has_tools := _has_tool_messages(tokenizer):
            tool = _opening(tokenizer, _calling, _ARGUMENTS, _TOOL)
            if tool[: len(openings[0])] != openings[0]:
                openings.append(tool)
        _check_counts(tokenizer, openings, has_tools)
    except (RequestError, ValueError) as error:
        raise CheckpointError(
            f"tail: {LAST_MESSAGE} cannot be derived from the base's chat template: {error}; give "
            "a number of tokens"
        ) from error
    return tuple(openings)


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _answered(answer: str) -> list[Message]:
    return [_user("Hello"), {"role": "assistant", "content": answer}]


def _calling(argument: str) -> list[Message]:
    function = {"name": "lookup", "arguments": {"key": argument}}
    call = {"type": "function", "id": _TOOL["tool_call_id"], "function": function}
    # The text stands in the content too: simple templates write that and no calls.
    return [_user("Hello"), {"role": "assistant", "content": argument, "tool_calls": [call]}]


def _has_tool_messages(tokenizer: Tokenizer) -> bool:
    try:
        text = _render(tokenizer, [*_calling(_BEFORE), {**_TOOL, "content": _MARK}])
    except RequestError:
        return False
    return _BEFORE in text and _MARK in text


def _opening(
    tokenizer: Tokenizer,
    earlier: Callable[[str], list[Message]],
    texts: Sequence[str],
    message: Message,
) -> tuple[int, ...]:
    """The longest beginning of `message` in token ids that does not depend on what is around it.

    Args:
        tokenizer: the base's.
        earlier: the messages before, the last of which holds the text that it is given.
        texts: to give it.
        message: without its content.
    """
    role = message["role"]
    opening = _opening_text(tokenizer, earlier(_BEFORE), message)
    seen: list[list[int]] = []
    for text, content in [*((t, _MARK) for t in texts), *((_BEFORE, c) for c in _CONTENTS)]:
        marked = _render(tokenizer, [*earlier(text), {**message, "content": _MARK}])
        before = marked[: marked.rindex(opening + _MARK)]
        whole = _render(tokenizer, [*earlier(text), {**message, "content": content}])
        head, ids = _encode(tokenizer, before), _encode(tokenizer, whole)
        if not whole.startswith(before) or ids[: len(head)] != head:
            raise ValueError(f"a {role} message does not begin at the border of a token")
        seen.append(ids[len(head) :])
    columns = zip(*seen, strict=False)
    common = itertools.takewhile(lambda column: len(set(column)) == 1, columns)
    if not (ids := tuple(column[0] for column in common)):
        raise ValueError(f"no token begins every {role} message")
    return ids


def _opening_text(tokenizer: Tokenizer, earlier: list[Message], message: Message) -> str:
    """What the template writes between the end of `earlier` and a content.

    Raises:
        ValueError: a message is left out, or `earlier`, which hold `_BEFORE`, do not end as they do
            when nothing follows.
    """
    alone = _render(tokenizer, earlier)
    text = _render(tokenizer, [*earlier, {**message, "content": _MARK}])
    if _BEFORE not in alone or _BEFORE not in text or _MARK not in text:
        raise ValueError("it leaves messages out")
    closing = alone[alone.rindex(_BEFORE) + len(_BEFORE) :]
    between = text[text.rindex(_BEFORE) + len(_BEFORE) : text.rindex(_MARK)]
    if not between.startswith(closing) or between == closing:
        raise ValueError("a message does not end as it does when it is the last one")
    return between[len(closing) :]


def _check_counts(tokenizer: Tokenizer, openings: Sequence[Sequence[int]], tools: bool) -> None:
    """Openings must begin every user and tool message, the first one too, and nothing else."""
    user = _user("Hello")
    cases: list[tuple[list[Message], int]] = [([user], 1), ([*_answered(_BEFORE), user], 2)]
    if tools:
        cases.append(([*_calling(_BEFORE), {**_TOOL, "content": _MARK}], 2))
    system: Message = {"role": "system", "content": "Be kind."}
    with contextlib.suppress(RequestError):  # not every template has system messages
        tokenizer.apply_chat_template([system, user])
        cases.append(([system, user], 1))
    for messages, expected in cases:
        ids = _encode(tokenizer, tokenizer.apply_chat_template(messages))
        if sum(_count(ids, opening) for opening in openings) != expected:
            raise ValueError(
                f"the tokens {list(openings[0])} do not begin each user message and nothing else"
            )


def _count(ids: Sequence[int], sequence: Sequence[int]) -> int:
    size = len(sequence)
    return sum(tuple(ids[i : i + size]) == tuple(sequence) for i in range(len(ids) - size + 1))


def _render(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=False)


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)
