"""How the two endpoints spell the same thing: pieces of text, whole answers, usage."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from msgspec import UNSET, Struct, UnsetType, structs

from pshare_jax.frontend.output import Piece, ScoredToken, SequenceOutput
from pshare_jax.frontend.params import OutputParams
from pshare_jax.serve.errors import ApiError
from pshare_jax.serve.prompt_scores import echoed, finite, listed, top_by_text
from pshare_jax.serve.protocol import Completion, CompletionChoice, CompletionLogprobs, Usage
from pshare_jax.text.tokenizer import Tokenizer

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


def part_id(answer: str, number: int) -> str:
    """32 hexadecimal digits for a part of an answer, the same whenever that is made."""
    return hashlib.blake2b(f"{answer}/{number}".encode(), digest_size=16).hexdigest()


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
        output: what is asked of the answer.
        echoes: for each choice the text that goes before the completion, usually empty.
        prompt_ids: for each choice the token ids of its prompt.
    """

    named_events = False

    def __init__(
        self,
        heading: Heading,
        tokenizer: Tokenizer,
        output: OutputParams,
        echoes: Sequence[str],
        prompt_ids: Sequence[Sequence[int]],
    ):
        self.heading = heading
        self._tokenizer = tokenizer
        self._output = output
        self._echoes = echoes
        self._prompt_ids = prompt_ids
        self._logprobs = output.logprobs
        # Echoed with its log-probabilities, a prompt comes with the first piece that follows them.
        self._scores_echo = output.echo and output.logprobs is not None
        self._echoed: set[int] = set()

    def opening(self, index: int, usage: Usage) -> Sequence[Event]:
        """The prompt, when it is echoed or its token ids are listed."""
        text = "" if self._scores_echo else self._echoes[index]
        if not text and not self._output.token_ids:
            return []
        choice = CompletionChoice(index, text, None, None, None)
        if self._output.token_ids:
            choice.token_ids, choice.prompt_token_ids = [], self._prompt_ids[index]
        return [self._completion([choice], self.heading.chunk_usage)]

    def chunk(self, index: int, piece: Piece, sequence: SequenceOutput) -> Sequence[Event]:
        """A piece of text."""
        choice = self._choice(index, piece, sequence)
        if self._scores_echo and index not in self._echoed:
            self._echoed.add(index)
            choice.text = self._echoes[index] + choice.text
            self._echo_scores(choice, sequence)
        return [self._completion([choice], self.heading.chunk_usage)]

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
        choices: list[CompletionChoice] = []
        for index, (piece, sequence) in enumerate(zip(pieces, sequences, strict=True)):
            choice = self._choice(index, piece, sequence)
            choice.text = self._echoes[index] + choice.text
            if self._output.token_ids:
                choice.prompt_token_ids = self._prompt_ids[index]
            if self._scores_echo:
                self._echo_scores(choice, sequence)
            scores, count = sequence.prompt_logprobs, self._output.prompt_logprobs
            if scores is not None and count is not None:
                ids = self._prompt_ids[index]
                choice.prompt_logprobs = listed(self._tokenizer, ids, scores, count)
            choices.append(choice)
        return self._completion(choices, usage)

    def _completion(
        self, choices: list[CompletionChoice], usage: Usage | UnsetType | None
    ) -> Completion:
        heading = self.heading
        return Completion(heading.id, heading.created, heading.model, choices, usage)

    def _choice(self, index: int, piece: Piece, sequence: SequenceOutput) -> CompletionChoice:
        logprobs = None
        if self._logprobs is not None:
            logprobs = self._scores(piece.tokens, len(self._echoes[index]))
        token_ids = piece.token_ids if self._output.token_ids else UNSET
        return CompletionChoice(
            index, piece.text, logprobs, sequence.finish_reason, sequence.stop_reason, token_ids
        )

    def _echo_scores(self, choice: CompletionChoice, sequence: SequenceOutput) -> None:
        """Puts the prompt's log-probabilities before those of `choice`."""
        scores, own = sequence.prompt_logprobs, choice.logprobs
        if scores is None or own is None:
            return
        choice.logprobs = echoed(
            self._tokenizer,
            self._prompt_ids[choice.index],
            scores,
            self._logprobs,
            self._echoes[choice.index],
            self._output.skip_special_tokens,
        )
        choice.logprobs.tokens += own.tokens
        choice.logprobs.token_logprobs += own.token_logprobs
        choice.logprobs.top_logprobs += own.top_logprobs
        choice.logprobs.text_offset += own.text_offset

    def _scores(self, tokens: Sequence[ScoredToken], start: int) -> CompletionLogprobs:
        """Log-probabilities of the completion, whose text begins `start` characters in."""
        return CompletionLogprobs(
            tokens=[self._tokenizer.token_text(token.token_id) for token in tokens],
            token_logprobs=[finite(token.logprobs.logprob) for token in tokens],
            top_logprobs=[
                top_by_text(self._tokenizer, token.token_id, token.logprobs, self._logprobs)
                for token in tokens
            ],
            text_offset=[start + token.offset for token in tokens],
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
