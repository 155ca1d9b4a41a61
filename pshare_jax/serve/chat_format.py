"""How `/v1/chat/completions` spells an answer: messages, their pieces, and calls in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import UNSET, Struct, UnsetType

from pshare_jax.core.requests import FinishReason
from pshare_jax.frontend.answers import AnswerReader, joined
from pshare_jax.frontend.output import Piece, ScoredToken, SequenceOutput
from pshare_jax.frontend.tool_calls.parts import CallArguments, CallStart, Part, Reasoning, Text
from pshare_jax.serve.errors import ApiError
from pshare_jax.serve.formats import DONE, Event, Heading
from pshare_jax.serve.prompt_scores import finite, listed
from pshare_jax.serve.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    Delta,
    FunctionCall,
    TokenLogprob,
    ToolCall,
    TopLogprob,
    Usage,
)
from pshare_jax.text.tokenizer import Tokenizer


class ChatFormat:
    """One answer of a chat, with its samples.

    Args:
        heading: see there.
        tokenizer: names the tokens of log-probabilities.
        logprobs: how many of the most likely tokens are listed, or None for no probabilities.
        reader: makes the reader of one sample.
        call_id: makes the id of a call, of what says which one it is.
        prompt_ids: token ids of the prompt, when token ids are listed.
        legacy: calls are spelled as `function_call`, which there can be one of.
        scored_ids: token ids of the prompt, when their log-probabilities are listed.
        prompt_logprobs: how many of the most likely tokens are listed for each of those.
    """

    def __init__(
        self,
        heading: Heading,
        tokenizer: Tokenizer,
        logprobs: int | None,
        reader: Callable[[], AnswerReader],
        call_id: Callable[[str], str],
        prompt_ids: Sequence[int] | None = None,
        legacy: bool = False,
        scored_ids: Sequence[int] = (),
        prompt_logprobs: int | None = None,
    ):
        self.heading = heading
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._new_reader = reader
        self._readers: dict[int, AnswerReader] = {}
        self._make_call_id = call_id
        self._prompt_ids = prompt_ids
        self._legacy = legacy
        self._scored_ids = scored_ids
        self._prompt_logprobs = prompt_logprobs

    named_events = False

    def opening(self, index: int, usage: Usage) -> Sequence[Event]:
        """The role."""
        delta = Delta(role="assistant", content="")
        chunk = self._chunk([ChatChoice(index, None, None, None, delta=delta)])
        if self._prompt_ids is not None:
            chunk.prompt_token_ids = self._prompt_ids
        return [chunk]

    def chunk(self, index: int, piece: Piece, sequence: SequenceOutput) -> Sequence[Event]:
        """A piece of the message."""
        reader = self._readers.setdefault(index, self._new_reader())
        delta = self._delta(index, read_parts(reader, piece, sequence))
        listed = piece.tokens or (self._prompt_ids is not None and piece.token_ids)
        if delta == Delta() and not listed and sequence.finish_reason is None:
            return []
        return [self._chunk([self._choice(index, piece, sequence, reader.calls, delta=delta)])]

    def closing(self, usage: Usage) -> Sequence[Event]:
        """The usage if it was asked for, and the end."""
        return [self._chunk([], usage), DONE] if self.heading.stream_usage else [DONE]

    def failure(self, error: ApiError) -> Sequence[Event]:
        """The error object."""
        return [error.body()]

    def answer(
        self, pieces: Sequence[Piece], sequences: Sequence[SequenceOutput], usage: Usage
    ) -> Struct:
        """All messages."""
        choices: list[ChatChoice] = []
        for index, (piece, sequence) in enumerate(zip(pieces, sequences, strict=True)):
            reader = self._new_reader()
            message = self._message(index, read_parts(reader, piece, sequence))
            choices.append(self._choice(index, piece, sequence, reader.calls, message=message))
        heading = self.heading
        ids = UNSET if self._prompt_ids is None else self._prompt_ids
        answer = ChatCompletion(
            heading.id, "chat.completion", heading.created, heading.model, choices, usage, ids
        )
        scores, count = sequences[0].prompt_logprobs, self._prompt_logprobs
        if scores is not None and count is not None:
            answer.prompt_logprobs = listed(self._tokenizer, self._scored_ids, scores, count)
        return answer

    def _call_id(self, choice: int, number: int) -> str:
        return self._make_call_id(f"{self.heading.id}/{choice}/{number}")

    def _message(self, choice: int, parts: list[Part]) -> AssistantMessage:
        reasoning, content, calls = joined(parts)
        message = AssistantMessage(None if calls and not content else content)
        if reasoning:
            message.reasoning_content = reasoning
        functions = [FunctionCall(arguments, name) for name, arguments in calls]
        if functions and self._legacy:
            message.function_call = functions[0]
        elif functions:
            message.tool_calls = [
                ToolCall(function, id=self._call_id(choice, number), type="function")
                for number, function in enumerate(functions)
            ]
        return message

    def _delta(self, choice: int, parts: list[Part]) -> Delta:
        delta = Delta()
        calls: dict[int, ToolCall] = {}
        for part in parts:
            match part:
                case Text(text):
                    delta.content = (delta.content or "") + text
                case Reasoning(text):
                    delta.reasoning_content = (delta.reasoning_content or "") + text
                case CallStart(index, name):
                    function = FunctionCall("", name)
                    call_id = self._call_id(choice, index)
                    calls[index] = ToolCall(function, index, call_id, "function")
                case CallArguments(index, text):
                    call = calls.setdefault(index, ToolCall(FunctionCall(""), index))
                    call.function.arguments += text
        if calls and self._legacy:
            delta.function_call = next(iter(calls.values())).function
        elif calls:
            delta.tool_calls = list(calls.values())
        return delta

    def _chunk(self, choices: list[ChatChoice], usage: Usage | None = None) -> ChatCompletion:
        heading = self.heading
        return ChatCompletion(
            heading.id,
            "chat.completion.chunk",
            heading.created,
            heading.model,
            choices,
            usage or heading.chunk_usage,
        )

    def _choice(
        self,
        index: int,
        piece: Piece,
        sequence: SequenceOutput,
        calls: int,
        message: AssistantMessage | UnsetType = UNSET,
        delta: Delta | UnsetType = UNSET,
    ) -> ChatChoice:
        logprobs = None
        if self._logprobs is not None:
            logprobs = ChatLogprobs([self._score(token) for token in piece.tokens])
        return ChatChoice(
            index,
            logprobs,
            self._finish_reason(sequence, calls),
            sequence.stop_reason,
            message,
            delta,
            UNSET if self._prompt_ids is None else piece.token_ids,
        )

    def _finish_reason(self, sequence: SequenceOutput, calls: int) -> str | None:
        if sequence.finish_reason is FinishReason.STOP and calls:
            return "function_call" if self._legacy else "tool_calls"
        return sequence.finish_reason

    def _score(self, token: ScoredToken) -> TokenLogprob:
        tokenizer, chosen = self._tokenizer, token.token_id
        return TokenLogprob(
            token=tokenizer.token_text(chosen),
            logprob=finite(token.logprobs.logprob),
            bytes=list(tokenizer.token_bytes(chosen)),
            top_logprobs=[
                TopLogprob(tokenizer.token_text(i), finite(value), list(tokenizer.token_bytes(i)))
                for i, value in token.logprobs.top[: self._logprobs]
            ],
        )


def read_parts(reader: AnswerReader, piece: Piece, sequence: SequenceOutput) -> list[Part]:
    """The parts of `piece`, and what was held back if it is the last."""
    parts = reader.push(piece.text)
    return parts + reader.finish() if sequence.finish_reason is not None else parts
