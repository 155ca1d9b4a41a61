"""What the offline engine answers with, and how it is gathered from the engine's events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pshare_jax.core.requests import FinishReason, PromptUsage, RequestOutput, TokenLogprobs
from pshare_jax.errors import EngineDeadError
from pshare_jax.text.detokenizer import StopMatcher
from pshare_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Completion:
    """What a model generated for one prompt.

    `token_ids` include the end token, or the stop token, that ended it; `text` contains neither it
    nor the stop string. `logprobs` has an entry for each token when they were asked for,
    `prompt_logprobs` one for each prompt token, None for the first.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: PromptUsage
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)


@dataclass(frozen=True)
class ToolCall:
    """A function that a model asks for; `arguments` is JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ChatAnswer(Completion):
    """An answer to a conversation: `text` as it was written, and read as its model writes.

    `content` is what is said, `reasoning` what was thought before, `tool_calls` what is asked for.
    """

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)


class Collector:
    """Gathers one request's events and looks for stop strings.

    Args:
        tokenizer: turns tokens into text.
        stop: strings that end it.
        shown: special tokens that are part of the text.
        min_tokens: up to which no stop string ends it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        shown: tuple[str, ...] = (),
        min_tokens: int = 0,
    ):
        self._min_tokens = min_tokens
        self._detokenizer = tokenizer.detokenizer(True, shown)
        self._matcher = StopMatcher(stop)
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[TokenLogprobs | None] = []
        self._usage: PromptUsage | None = None
        self._reason: FinishReason | None = None

    @property
    def done(self) -> bool:
        """Whether the text has come to its end."""
        return self._reason is not None

    def add(self, event: RequestOutput) -> None:
        """Takes an event in; what comes after the end is ignored.

        Raises:
            EngineDeadError: the engine has given the request up.
        """
        if self.done:
            return
        if event.error is not None:
            raise EngineDeadError(event.error)
        self._usage = event.usage or self._usage
        self._prompt_logprobs += event.prompt_logprobs or ()
        last = len(event.token_ids) - 1
        for i, token in enumerate(event.token_ids):
            self._tokens.append(token)
            self._logprobs += event.logprobs[i : i + 1]
            if i == last and event.stop_token is not None:
                break
            text, may_end = self._detokenizer.push(token), len(self._tokens) > self._min_tokens
            self._text.append(self._matcher.push(text, may_end=may_end))
            if self._matcher.matched is not None:
                self._reason = FinishReason.STOP
                return
        if event.finish_reason is not None:
            self._text.append(self._matcher.push(self._detokenizer.finish()))
            self._text.append(self._matcher.finish())
            self._reason = event.finish_reason

    def completion(self) -> Completion:
        """All of it, once it is done."""
        assert self._reason is not None
        assert self._usage is not None
        return Completion(
            "".join(self._text),
            self._tokens,
            self._reason,
            self._usage,
            self._logprobs,
            self._prompt_logprobs,
        )
