"""One sequence's way from tokens to the text, log-probabilities and counts of an answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from pshare_jax.core.requests import FinishReason, PromptUsage, RequestOutput, TokenLogprobs
from pshare_jax.frontend.params import OutputParams
from pshare_jax.text.detokenizer import StopMatcher
from pshare_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ScoredToken:
    """A token of the answer; its text starts `offset` characters into the completion."""

    token_id: int
    logprobs: TokenLogprobs
    offset: int


@dataclass(frozen=True)
class Piece:
    """What an answer gained since the last piece.

    `token_ids` are all that were generated, be their text shown, held back or cut off.
    """

    text: str
    tokens: list[ScoredToken]
    token_ids: list[int]


class SequenceOutput:
    """Collects the events of one sequence and hands out what is safe to show.

    A token's log-probabilities go out with its text: those of a cut-off stop string, or of the stop
    token itself, do not. A stop token counts as a completion token; it is text only when
    `include_stop` asks for it.

    Attributes:
        completion_tokens: tokens so far, up to the one that completed a stop string.
        usage: where the prompt's KV came from, once known.
        finish_reason: set when the sequence has ended.
        stop_reason: the stop string, or the stop token that is not an end token; else None.
        error: the engine's message, for `FinishReason.ERROR`.
        prompt_logprobs: an entry for each prompt token, None for the first; None without scores.
    """

    def __init__(self, tokenizer: Tokenizer, params: OutputParams):
        self._detokenizer = tokenizer.detokenizer(params.skip_special_tokens, params.shown_specials)
        self._eos_token_ids = tokenizer.eos_token_ids
        self._matcher = StopMatcher(params.stop, params.include_stop)
        self._include_stop = params.include_stop
        self._min_tokens = params.min_tokens
        self._text: list[str] = []
        self._scored: deque[ScoredToken] = deque()
        self._token_ids: list[int] = []
        self._decoded = 0
        self._released = 0
        self.completion_tokens = 0
        self.usage: PromptUsage | None = None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.error: str | None = None
        self.prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
        self._total_logprob = 0.0

    @property
    def mean_logprob(self) -> float:
        """Of its tokens; 0 where log-probabilities were not asked for."""
        return self._total_logprob / max(self.completion_tokens, 1)

    def feed(self, output: RequestOutput) -> None:
        """Takes an event. Tokens after a stop string are ignored, as is the rest of the event."""
        self.usage = output.usage or self.usage
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        last = len(output.token_ids) - 1
        for position, token_id in enumerate(output.token_ids):
            self.completion_tokens += 1
            self._token_ids.append(token_id)
            if output.logprobs:
                self._total_logprob += output.logprobs[position].logprob
            is_stop_token = position == last and output.stop_token is not None
            if is_stop_token and not self._include_stop:
                break
            if output.logprobs:
                scored = ScoredToken(token_id, output.logprobs[position], self._decoded)
                self._scored.append(scored)
            self._release(self._detokenizer.push(token_id))
            if self._matched():
                return
        if output.finish_reason is not None:
            self._release(self._detokenizer.finish())
            if not self._matched():
                self._end(output)

    def take(self) -> Piece:
        """What has become safe to show since the last call."""
        text = "".join(self._text)
        self._text.clear()
        # A token without text waits for the text after it: a stop string may yet cut there.
        everything = self.finish_reason is not None and self._matcher.matched is None
        tokens: list[ScoredToken] = []
        while self._scored and (everything or self._scored[0].offset < self._released):
            tokens.append(self._scored.popleft())
        token_ids, self._token_ids = self._token_ids, []
        return Piece(text, tokens, token_ids)

    def _release(self, decoded: str) -> None:
        self._decoded += len(decoded)
        may_end = self.completion_tokens > self._min_tokens
        self._show(self._matcher.push(decoded, may_end=may_end))

    def _show(self, text: str) -> None:
        if text:
            self._released += len(text)
            self._text.append(text)

    def _matched(self) -> bool:
        if self._matcher.matched is None:
            return False
        self.finish_reason = FinishReason.STOP
        self.stop_reason = self._matcher.matched
        return True

    def _end(self, output: RequestOutput) -> None:
        self._show(self._matcher.finish())
        self.finish_reason = output.finish_reason
        self.error = output.error
        if output.stop_token is not None and output.stop_token not in self._eos_token_ids:
            self.stop_reason = output.stop_token
