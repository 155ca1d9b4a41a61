"""A sequence that runs: what is known of it, and how far its KV reaches."""

from __future__ import annotations

from dataclasses import dataclass, field

from pshare_jax.core.requests import FinishReason
from pshare_jax.core.sequences import Sequence


@dataclass(eq=False)
class DecodeRow:
    """A sequence that runs: `num_kv` positions of it have KV in `pages`, or will have once the
    plans under way are done; `planned` tokens of it are under way."""

    sequence: Sequence
    slot: int
    pages: list[int]
    num_kv: int
    output: list[int] = field(default_factory=list[int])
    planned: int = 0
    last_step: int = -1

    @property
    def order(self) -> int:
        """Arrival order."""
        return self.sequence.order

    @property
    def started(self) -> bool:
        """Whether a token of it has been generated, here or before it was preempted."""
        return len(self.output) + self.planned > 0

    @property
    def num_behind(self) -> int:
        """Known tokens without KV; the last of them is fed to the step that samples."""
        return len(self.sequence.prompt) + len(self.output) + self.planned - self.num_kv

    @property
    def num_replayed(self) -> int:
        """Known tokens whose KV has to be computed before a step can be fed the last one."""
        return len(self.sequence.prompt) + len(self.output) - 1 - self.num_kv

    @property
    def remaining(self) -> int:
        """Tokens that may still be planned."""
        return self.sequence.params.max_tokens - len(self.output) - self.planned

    def known_tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """Known tokens at positions start..stop-1."""
        prompt, n = self.sequence.prompt, len(self.sequence.prompt)
        if start >= n:
            return tuple(self.output[start - n : stop - n])
        return (*prompt[start:stop], *self.output[: max(stop - n, 0)])

    def accept(self, tokens: list[int]) -> tuple[list[int], FinishReason | None]:
        """Takes in generated tokens, up to the first that ends the sequence, and why it did."""
        accepted: list[int] = []
        for token in tokens:
            accepted.append(token)
            self.output.append(token)
            if token in self.sequence.end_token_ids:
                return accepted, FinishReason.STOP
            if len(self.output) >= self.sequence.params.max_tokens:
                return accepted, FinishReason.LENGTH
        return accepted, None
