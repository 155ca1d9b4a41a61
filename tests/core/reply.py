"""What a client of a scripted host has got of a request, and what it should get."""

from __future__ import annotations

from dataclasses import dataclass, field

from pshare_jax.core.requests import (
    FinishReason,
    PromptUsage,
    Request,
    RequestOutput,
    TokenLogprobs,
)


@dataclass
class Reply:
    """What a client has got of a request, and what it should get."""

    request: Request
    expected: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    usage: PromptUsage | None = None
    reason: FinishReason | None = None
    error: str | None = None
    aborted: bool = False

    def take(self, event: RequestOutput) -> None:
        """Takes an event, of which none may follow the last."""
        assert self.reason is None, f"{self.request.id}: an event came after the last one"
        self.tokens += event.token_ids
        self.logprobs += event.logprobs
        assert not (event.usage and event.token_ids and self.usage), "usage came twice"
        self.usage = event.usage or self.usage
        self.reason, self.error = event.finish_reason, event.error
        assert self.tokens == self.expected[: len(self.tokens)], f"{self.request.id}: wrong tokens"

    def check_ended(self) -> None:
        """Asserts that it has ended well, or that there is a reason why not."""
        assert self.reason is not None, f"{self.request.id} has not ended"
        if self.reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert self.tokens == self.expected, f"{self.request.id}: tokens are missing"
            if self.request.params.logprobs is not None:
                assert [entry.logprob for entry in self.logprobs] == [-t for t in self.tokens]
            usage = self.usage
            assert usage is not None
            tail = usage.prompt_tokens - usage.computed_tokens - usage.cached_tokens
            assert tail >= 1
        elif self.reason is FinishReason.ABORT:
            assert self.aborted, f"{self.request.id} was not aborted"
        else:
            assert self.error
