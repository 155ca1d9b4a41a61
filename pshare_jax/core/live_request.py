"""A request that has not ended: what was delivered of it, and the present attempt."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from pshare_jax.core.models import ModelSpec
from pshare_jax.core.pages.prefix_index import block_key, block_keys, root_key
from pshare_jax.core.requests import (
    FinishReason,
    PromptUsage,
    Request,
    RequestOutput,
    RequestTimes,
    TokenLogprobs,
)
from pshare_jax.core.sequences import Moved, Sequence


@dataclass(eq=False)
class LiveRequest:
    """What the dispatcher knows of a request.

    Args:
        request: as it was submitted.
        model: that answers it.
        order: of arrival.
        seed: of its random draws.
        end_token_ids: tokens that end it.
        covered: the first positions of the prompt, which the prefill module covers.
        adapted: whether the model's LoRA adapter is on.
        root: key that the chain of keys starts from.
        keys: chained keys of the full pages of the covered positions.
        last_key: one more for all covered positions.
        times: when what was heard of it.
        sequence: the present attempt, if there is one.
        output: tokens that were delivered.
        told: first tokens of `output` that are known to whom covers replies.
        usage: of the first attempt that has started.
        usage_sent: whether the client has it.
        started: whether the present attempt has a decode slot.
        aborted: whether nobody waits for it any more.
        lost: attempts that were lost to failures.
        avoided: prefill workers whose pages could not be fetched.
    """

    request: Request
    model: ModelSpec
    order: int
    seed: int
    end_token_ids: frozenset[int]
    covered: int
    adapted: bool
    root: bytes
    keys: list[bytes]
    last_key: bytes
    times: RequestTimes
    sequence: Sequence | None = None
    output: list[int] = field(default_factory=list[int])
    told: int = 0
    usage: PromptUsage | None = None
    usage_sent: bool = False
    started: bool = False
    aborted: bool = False
    lost: int = 0
    avoided: set[str] = field(default_factory=set[str])

    @classmethod
    def of(
        cls,
        request: Request,
        model: ModelSpec,
        page_size: int,
        *,
        order: int,
        seed: int,
        end_token_ids: frozenset[int],
        now: float,
    ) -> LiveRequest:
        """A request that was just submitted; its prompt is split and hashed here."""
        prompt = request.prompt_token_ids
        split = model.split_rule.split(prompt)
        root = root_key(model.namespace, request.cache_salt)
        keys = block_keys(root, prompt[: split.covered], page_size)
        rest = prompt[len(keys) * page_size : split.covered]
        return cls(
            request,
            model,
            order,
            seed,
            end_token_ids,
            split.covered,
            split.invoked,
            root,
            keys,
            block_key(keys[-1] if keys else root, rest),
            RequestTimes(now),
        )

    def attempt(self, id: int, max_ttl: float) -> Sequence:
        """A new attempt, which no worker has been chosen for; it goes on from what was delivered.

        Args:
            id: of the attempt.
            max_ttl: most seconds for which its pages may outlive it.
        """
        request = self.request
        return Sequence(
            id=id,
            order=self.order,
            model=self.model.name,
            prompt=request.prompt_token_ids,
            output=tuple(self.output),
            covered=self.covered,
            adapted=self.adapted,
            root=self.root,
            keys=self.keys,
            last_key=self.last_key,
            params=request.params,
            seed=self.seed,
            end_token_ids=self.end_token_ids,
            probe=request.probe,
            ttl=min(request.session.ttl, max_ttl),
            owner=request.owner,
        )

    def moving(self, before: Sequence, id: int, moved: Moved) -> Sequence:
        """An attempt that goes on from `before` with the KV that it takes along."""
        return msgspec.structs.replace(
            before,
            id=id,
            output=tuple(self.output),
            prefill_worker=moved.worker,
            num_uncached=0,
            moved=moved,
        )

    def begin(self, sequence: Sequence) -> None:
        """`sequence`, with its workers, is the present attempt from now on."""
        self.sequence, self.started = sequence, False
        if not self.times.prefill_worker:
            self.times.prefill_worker = sequence.prefill_worker
            self.times.decode_worker = sequence.decode_worker

    def hear_started(self, usage: PromptUsage, now: float) -> None:
        """The present attempt has a decode slot."""
        self.started = True
        self.usage = self.usage or usage
        if self.times.started is None:
            self.times.started = now

    def hear_pending(self, tokens: int, now: float) -> None:
        """A prefill worker has begun with the prompt, and has so many tokens to go."""
        if self.times.prefill is None:
            self.times.prefill = now
        if not tokens and self.times.covered is None:
            self.times.covered = now

    def event(
        self,
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
        reason: FinishReason | None = None,
        error: str | None = None,
    ) -> RequestOutput:
        """What the client hears next; the usage goes with the first event alone."""
        usage = None if self.usage_sent else self.usage
        self.usage_sent = True
        return RequestOutput(
            request_id=self.request.id,
            token_ids=tokens,
            logprobs=logprobs,
            usage=usage,
            finish_reason=reason,
            stop_token=tokens[-1] if tokens and reason is FinishReason.STOP else None,
            error=error,
            times=self.times if usage is not None or reason is not None else None,
        )
