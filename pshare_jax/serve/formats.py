"""How the two endpoints spell the same thing: pieces of text, whole answers, usage."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from msgspec import UNSET, Struct, UnsetType, structs

from pshare_jax.frontend.output import Piece, ScoredToken, SequenceOutput
from pshare_jax.serve.errors import ApiError
from pshare_jax.serve.protocol import Completion, CompletionChoice, CompletionLogprobs, Usage
from pshare_jax.text.tokenizer import Tokenizer

# JSON has no minus infinity; OpenAI's stand-in for a probability of zero.
MIN_LOGPROB = -9999.0
DONE = b"[DONE]"


@dataclass(frozen=True)
class Heading:
    """What all objects of one answer repeat. `stream_usage`: chunks say `usage: null`."""

    id: str
    created: int
    model: str
    stream_usage: bool

    @property
    def chunk_usage(self) -> UnsetType | None:
        """The `usage` of a chunk that carries none."""
        return None if self.stream_usage else UNSET


def heading(prefix: str, model: str, stream_usage: bool = False) -> Heading:
    """A new answer's heading."""
    return Heading(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model, stream_usage)


# What one event of a stream carries: an object, or bytes that are written as they are.
Event = Struct | Mapping[str, Any] | bytes


class Format(Protocol):
    """The spelling of one endpoint.

    Attributes:
        heading: see there.
        named_events: whether the events of a stream are named by their `type`.
    """

    heading: Heading
    named_events: bool

    def opening(self, index: int, usage: Usage) -> Sequence[Event]:
        """What opens choice `index`; `usage` is known as far as the prompt goes."""
        ...

    def chunk(self, index: int, piece: Piece, sequence: SequenceOutput) -> Sequence[Event]:
        """A piece of choice `index`; nothing if there is nothing to say yet."""
        ...

    def closing(self, usage: Usage) -> Sequence[Event]:
        """What ends the stream."""
        ...

    def failure(self, error: ApiError) -> Sequence[Event]:
        """What ends a stream that has failed."""
        ...

    def answer(
        self, pieces: Sequence[Piece], sequences: Sequence[SequenceOutput], usage: Usage
    ) -> Struct | Mapping[str, Any]:
        """The whole answer."""
        ...


class CompletionFormat:
    """`/v1/completions`.

    Args:
        echoes: for each choice the text that goes before the completion, usually empty.
        logprobs: how many of the most likely tokens are listed, or None for no probabilities.
        prompt_ids: for each choice the token ids of its prompt, when token ids are listed.
    """

    named_events = False

    def __init__(
        self,
        heading: Heading,
        tokenizer: Tokenizer,
        echoes: Sequence[str],
        logprobs: int | None,
        prompt_ids: Sequence[Sequence[int]] | None = None,
    ):
        self.heading = heading
        self._tokenizer = tokenizer
        self._echoes = echoes
        self._logprobs = logprobs
        self._prompt_ids = prompt_ids

    def opening(self, index: int, usage: Usage) -> Sequence[Event]:
        """The prompt, when it is echoed or its token ids are listed."""
        if not self._echoes[index] and self._prompt_ids is None:
            return []
        choice = CompletionChoice(index, self._echoes[index], None, None, None)
        if self._prompt_ids is not None:
            choice.token_ids, choice.prompt_token_ids = [], self._prompt_ids[index]
        return [self._completion([choice], self.heading.chunk_usage)]

    def chunk(self, index: int, piece: Piece, sequence: SequenceOutput) -> Sequence[Event]:
        """A piece of text."""
        choices = [self._choice(index, piece, sequence)]
        return [self._completion(choices, self.heading.chunk_usage)]

    def closing(self, usage: Usage) -> Sequence[Event]:
        """The usage if it was asked for, and the end."""
        return [self._completion([], usage), DONE] if self.heading.stream_usage else [DONE]

    def failure(self, error: ApiError) -> Sequence[Event]:
        """The error object."""
        return [error.body()]

    def answer(
        self, pieces: Sequence[Piece], sequences: Sequence[SequenceOutput], usage: Usage
    ) -> Struct:
        """All texts, after their echoed prompts."""
        choices = []
        for index, (piece, sequence) in enumerate(zip(pieces, sequences, strict=True)):
            choice = self._choice(index, piece, sequence)
            choice.text = self._echoes[index] + choice.text
            if self._prompt_ids is not None:
                choice.prompt_token_ids = self._prompt_ids[index]
            choices.append(choice)
        return self._completion(choices, usage)

    def _completion(
        self, choices: list[CompletionChoice], usage: Usage | UnsetType | None
    ) -> Completion:
        heading = self.heading
        return Completion(heading.id, heading.created, heading.model, choices, usage)

    def _choice(self, index: int, piece: Piece, sequence: SequenceOutput) -> CompletionChoice:
        logprobs = None if self._logprobs is None else self._scores(piece.tokens)
        token_ids = UNSET if self._prompt_ids is None else piece.token_ids
        return CompletionChoice(
            index, piece.text, logprobs, sequence.finish_reason, sequence.stop_reason, token_ids
        )

    def _scores(self, tokens: Sequence[ScoredToken]) -> CompletionLogprobs:
        name = self._tokenizer.token_text
        top_logprobs = []
        for token in tokens:
            top = {name(i): finite(value) for i, value in token.logprobs.top[: self._logprobs]}
            # The chosen token is always listed, though it may not be among the most likely.
            top.setdefault(name(token.token_id), finite(token.logprobs.logprob))
            top_logprobs.append(top)
        return CompletionLogprobs(
            tokens=[name(token.token_id) for token in tokens],
            token_logprobs=[finite(token.logprobs.logprob) for token in tokens],
            top_logprobs=top_logprobs,
            text_offset=[token.offset for token in tokens],
        )


def with_usage(event: Event, usage: Usage | None) -> Event:
    """`event`, saying what was used so far, if that is known and is to be said."""
    if usage is None or not isinstance(event, Struct):
        return event
    return structs.replace(event, usage=usage)


def encode_answer(answer: Struct | Mapping[str, Any]) -> bytes:
    """JSON of a whole answer. Its choices are encoded one by one: what holds a hundred long ones is
    else encoded in one go, which keeps every thread waiting."""
    choices = getattr(answer, "choices", None)
    if choices and isinstance(answer, Struct):
        raw: list[Any] = [msgspec.Raw(msgspec.json.encode(choice)) for choice in choices]
        answer = structs.replace(answer, choices=raw)
    return msgspec.json.encode(answer)


def finite(logprob: float) -> float:
    """`logprob`, or what stands for minus infinity."""
    return max(logprob, MIN_LOGPROB)
