"""How Anthropic's Messages API spells an answer: content blocks, and events about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from pshare_jax.core.requests import FinishReason
from pshare_jax.frontend.answers import AnswerReader, joined
from pshare_jax.frontend.output import Piece, SequenceOutput
from pshare_jax.frontend.tool_calls.parts import CallArguments, CallStart, Part, Reasoning, Text
from pshare_jax.serve.chat_format import read_parts
from pshare_jax.serve.errors import ApiError
from pshare_jax.serve.formats import Event, Heading
from pshare_jax.serve.protocol import Usage

_ERROR_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class MessagesFormat:
    """`/v1/messages`.

    Args:
        heading: see there.
        reader: reads the answer's text.
        call_id: makes the id of a call, of what says which one it is.
    """

    named_events = True

    def __init__(self, heading: Heading, reader: AnswerReader, call_id: Callable[[str], str]):
        self.heading = heading
        self._reader = reader
        self._call_id = call_id
        self._calls = 0
        self._open = ""
        self._blocks = 0
        self._stop: tuple[str | None, str | None] = (None, None)

    def opening(self, index: int, usage: Usage) -> Sequence[Event]:
        """The message without content; of the usage the prompt's part."""
        message = self._message([], (None, None), usage)
        message["usage"]["output_tokens"] = 0
        return [{"type": "message_start", "message": message}]

    def chunk(self, index: int, piece: Piece, sequence: SequenceOutput) -> Sequence[Event]:
        """What the piece adds to the last block, and the blocks that it opens and closes."""
        parts = read_parts(self._reader, piece, sequence)
        events = [event for part in parts for event in self._events(part)]
        if sequence.finish_reason is not None:
            self._stop = _stop(sequence, self._reader.calls)
            events += self._close()
        return events

    def closing(self, usage: Usage) -> Sequence[Event]:
        """Why it ended, and the usage."""
        reason, stop = self._stop
        return [
            {
                "type": "message_delta",
                "delta": {"stop_reason": reason, "stop_sequence": stop},
                "usage": _usage(usage),
            },
            {"type": "message_stop"},
        ]

    def failure(self, error: ApiError) -> Sequence[Event]:
        """The error object."""
        return [error_object(error)]

    def answer(
        self, pieces: Sequence[Piece], sequences: Sequence[SequenceOutput], usage: Usage
    ) -> dict[str, Any]:
        """The whole message."""
        reasoning, content, calls = joined(read_parts(self._reader, pieces[0], sequences[0]))
        blocks: list[dict[str, Any]] = []
        if reasoning:
            blocks.append({"type": "thinking", "thinking": reasoning, "signature": ""})
        if content:
            blocks.append({"type": "text", "text": content})
        for name, arguments in calls:
            blocks.append({**self._call(name), "input": _as_object(arguments)})
        return self._message(blocks, _stop(sequences[0], self._reader.calls), usage)

    def _events(self, part: Part) -> Iterator[Event]:
        match part:
            case Text(text):
                yield from self._in_block({"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": text})
            case Reasoning(text):
                yield from self._in_block({"type": "thinking", "thinking": "", "signature": ""})
                yield self._delta({"type": "thinking_delta", "thinking": text})
            case CallStart(_, name):
                yield from self._close()
                yield from self._in_block(self._call(name))
            case CallArguments(_, text):
                yield self._delta({"type": "input_json_delta", "partial_json": text})

    def _in_block(self, block: dict[str, Any]) -> Iterator[Event]:
        """Opens a block like `block` unless one is open."""
        if self._open == block["type"]:
            return
        yield from self._close()
        self._open = block["type"]
        yield {"type": "content_block_start", "index": self._blocks, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": self._blocks, "delta": delta}

    def _close(self) -> Iterator[Event]:
        if self._open:
            yield {"type": "content_block_stop", "index": self._blocks}
            self._open = ""
            self._blocks += 1

    def _call(self, name: str) -> dict[str, Any]:
        call_id = self._call_id(f"{self.heading.id}/0/{self._calls}").removeprefix("call_")
        self._calls += 1
        return {"type": "tool_use", "id": f"toolu_{call_id}", "name": name, "input": {}}

    def _message(
        self, blocks: list[dict[str, Any]], stop: tuple[str | None, str | None], usage: Usage
    ) -> dict[str, Any]:
        return {
            "id": self.heading.id,
            "type": "message",
            "role": "assistant",
            "model": self.heading.model,
            "content": blocks,
            "stop_reason": stop[0],
            "stop_sequence": stop[1],
            "usage": _usage(usage),
        }


def error_object(error: ApiError) -> dict[str, Any]:
    """`error` as Anthropic's clients expect it."""
    kind = "api_error" if error.status >= 500 else "invalid_request_error"
    kind = _ERROR_TYPES.get(error.status, kind)
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def _usage(usage: Usage) -> dict[str, Any]:
    """Input tokens are those that were computed: cached ones are counted apart."""
    cached = usage.prompt_tokens_details.cached_tokens
    return {
        "input_tokens": usage.prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.completion_tokens,
    }


def _stop(sequence: SequenceOutput, calls: int) -> tuple[str | None, str | None]:
    """`stop_reason` and `stop_sequence` of an answer that has ended."""
    if sequence.finish_reason is FinishReason.LENGTH:
        return "max_tokens", None
    if isinstance(sequence.stop_reason, str):
        return "stop_sequence", sequence.stop_reason
    return ("tool_use" if calls else "end_turn"), None


def _as_object(arguments: str) -> dict[str, Any]:
    """Arguments as an object; broken JSON, as of a call that was cut off, gives an empty one."""
    try:
        return msgspec.json.decode(arguments, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return {}
