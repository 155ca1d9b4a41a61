"""How OpenAI's Responses API spells an answer: items, and numbered events about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pshare_jax.core.requests import FinishReason
from pshare_jax.frontend.answers import AnswerReader
from pshare_jax.frontend.output import Piece, SequenceOutput
from pshare_jax.frontend.responses_api import ResponsesRequest
from pshare_jax.frontend.tool_calls.parts import CallArguments, CallStart, Part, Reasoning, Text
from pshare_jax.serve.chat_format import read_parts
from pshare_jax.serve.errors import ApiError
from pshare_jax.serve.formats import Event, Heading, part_id
from pshare_jax.serve.protocol import Usage
from pshare_jax.text.tokenizer import Tokenizer

Item = dict[str, Any]


class ResponsesFormat:
    """`/v1/responses`.

    Args:
        heading: see there.
        body: the request, much of which the answer repeats.
        reader: reads the answer's text.
        call_id: makes the id of a call, of what says which one it is.
        tokenizer: counts the tokens of thoughts.
    """

    named_events = True

    def __init__(
        self,
        heading: Heading,
        body: ResponsesRequest,
        reader: AnswerReader,
        call_id: Callable[[str], str],
        tokenizer: Tokenizer,
    ):
        self.heading = heading
        self._body = body
        self._reader = reader
        self._call_id = call_id
        self._tokenizer = tokenizer
        self._items: list[Item] = []
        self._open: Item | None = None
        self._sequence_number = 0
        self._status = "in_progress"

    def opening(self, index: int, usage: Usage) -> Sequence[Event]:
        """The response as it is before anything is generated."""
        return [
            self._event("response.created", response=self._response()),
            self._event("response.in_progress", response=self._response()),
        ]

    def chunk(self, index: int, piece: Piece, sequence: SequenceOutput) -> Sequence[Event]:
        """What the piece adds to the last item, and the items that it opens and closes."""
        parts = read_parts(self._reader, piece, sequence)
        return list(self._events(parts, sequence.finish_reason))

    def closing(self, usage: Usage) -> Sequence[Event]:
        """The whole response."""
        return [self._event(f"response.{self._status}", response=self._response(usage))]

    def failure(self, error: ApiError) -> Sequence[Event]:
        """The response with its error."""
        self._status = "failed"
        response = self._response()
        response["error"] = {"code": error.code or "server_error", "message": error.message}
        return [self._event("response.failed", response=response)]

    def answer(
        self, pieces: Sequence[Piece], sequences: Sequence[SequenceOutput], usage: Usage
    ) -> dict[str, Any]:
        """The whole response."""
        self.chunk(0, pieces[0], sequences[0])
        return self._response(usage)

    def _events(self, parts: list[Part], finish: FinishReason | None) -> Iterator[Event]:
        for part in parts:
            match part:
                case Text(text):
                    yield from self._in_item("message")
                    yield self._add_text("output_text", text, {"logprobs": []})
                case Reasoning(text):
                    yield from self._in_item("reasoning")
                    yield self._add_text("reasoning_text", text, {})
                case CallStart(_, name):
                    yield from self._close()
                    yield from self._start(self._call(name))
                case CallArguments(_, text):
                    if self._open is not None:
                        self._open["arguments"] += text
                        yield self._about("response.function_call_arguments.delta", delta=text)
        if finish is None:
            return
        if not self._items:
            yield from self._in_item("message")  # an empty answer is one too
        self._status = "incomplete" if finish is FinishReason.LENGTH else "completed"
        yield from self._close()

    def _in_item(self, kind: str) -> Iterator[Event]:
        """Opens an item of `kind` unless it is open."""
        if self._open is not None and self._open["type"] == kind:
            return
        yield from self._close()
        item: Item = {"id": "", "type": kind, "status": "in_progress", "content": []}
        if kind == "message":
            item |= {"id": self._item_id("msg"), "role": "assistant"}
        else:
            item |= {"id": self._item_id("rs"), "summary": []}
        yield from self._start(item)
        part = _part(kind)
        yield self._about("response.content_part.added", content_index=0, part=dict(part))
        item["content"].append(part)

    def _start(self, item: Item) -> Iterator[Event]:
        self._items.append(item)
        self._open = item
        copy = dict(item)
        if "content" in item:
            copy["content"] = []
        yield self._event(
            "response.output_item.added", output_index=len(self._items) - 1, item=copy
        )

    def _add_text(self, kind: str, text: str, extra: dict[str, Any]) -> Event:
        assert self._open is not None
        self._open["content"][0]["text"] += text
        return self._about(f"response.{kind}.delta", content_index=0, delta=text, **extra)

    def _close(self) -> Iterator[Event]:
        item, index = self._open, len(self._items) - 1
        if item is None:
            return
        if item["type"] == "function_call":
            yield self._about(
                "response.function_call_arguments.done",
                name=item["name"],
                arguments=item["arguments"],
            )
        else:
            part = item["content"][0]
            extra: dict[str, Any] = {"logprobs": []} if part["type"] == "output_text" else {}
            yield self._about(
                f"response.{part['type']}.done", content_index=0, text=part["text"], **extra
            )
            yield self._about("response.content_part.done", content_index=0, part=dict(part))
        item["status"] = "incomplete" if self._status == "incomplete" else "completed"
        self._open = None
        yield self._event("response.output_item.done", output_index=index, item=dict(item))

    def _call(self, name: str) -> Item:
        return {
            "id": self._item_id("fc"),
            "type": "function_call",
            "status": "in_progress",
            "call_id": self._call_id(f"{self.heading.id}/0/{len(self._items)}"),
            "name": name,
            "arguments": "",
        }

    def _item_id(self, prefix: str) -> str:
        """The id of the next item, which is the same if the answer is made again."""
        return f"{prefix}_{part_id(self.heading.id, len(self._items))}"

    def _about(self, kind: str, **fields: Any) -> Event:
        """An event about the open item."""
        assert self._open is not None
        where = {"item_id": self._open["id"], "output_index": len(self._items) - 1}
        return self._event(kind, **where, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._sequence_number, **fields}
        self._sequence_number += 1
        return event

    def _response(self, usage: Usage | None = None) -> dict[str, Any]:
        body = self._body
        cut = self._status == "incomplete"
        return {
            "id": self.heading.id,
            "object": "response",
            "created_at": self.heading.created,
            "status": self._status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.heading.model,
            "output": [dict(item) for item in self._items],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": {"type": "text"}, **(body.text or {})},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else self._usage(usage),
            "user": None,
        }

    def _usage(self, usage: Usage) -> dict[str, Any]:
        thoughts = "".join(
            part["text"] for i in self._items if i["type"] == "reasoning" for part in i["content"]
        )
        tokens = len(self._tokenizer.encode(thoughts, add_special_tokens=False)) if thoughts else 0
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.prompt_tokens_details.cached_tokens,
                "shared_tokens": usage.prompt_tokens_details.shared_tokens,
            },
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": min(tokens, usage.completion_tokens)},
            "total_tokens": usage.total_tokens,
        }


def _part(kind: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": ""}
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
