"""One sequence on its way through the engines: host state only, no jax."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pshare_jax.cache.prefix_index import block_key, block_keys, root_key
from pshare_jax.config import Sharing
from pshare_jax.engine.request import (
    FinishReason,
    PromptUsage,
    Request,
    RequestOutput,
    TokenLogprobs,
)
from pshare_jax.models.split import split_prompt

logger = logging.getLogger(__name__)

Sink = Callable[[RequestOutput], None]
ModelKind = Literal["identity", "full", "lora"]


@dataclass(frozen=True)
class ModelRuntime:
    """What the engines know of a served model.

    `prefill_weights` names the weights that prefill for it (the base's, or its own when isolated)
    and `namespace` the KV they write. Models of one `group` are batched together; `adapter` is the
    model's index among the group's stacked LoRA adapters, or -1.
    """

    name: str
    kind: ModelKind
    sharing: Sharing
    tail: int
    prefill_weights: str
    namespace: str
    group: str
    adapter: int = -1
    decode_engines: tuple[int, ...] = (0,)


class Sequence:
    """A request with everything that is known of it so far.

    It is owned by one thread at a time: the submitting one, then a prefill engine's, then a
    decode engine's. Only `abort_requested` and `finish` may be used from others. `on_finish` is
    called before the last event is emitted, so that who has seen that finds the books closed.
    """

    def __init__(
        self,
        request: Request,
        model: ModelRuntime,
        sink: Sink,
        *,
        order: int,
        seed: int,
        page_size: int,
        end_token_ids: frozenset[int],
        on_finish: Callable[[Sequence, FinishReason], None],
    ):
        self.request = request
        self.model = model
        self.order = order
        self.seed = seed
        self.prompt = list(request.prompt_token_ids)
        self.cover = split_prompt(len(self.prompt), model.tail)
        self.root = root_key(model.namespace, request.cache_salt)
        self.keys = block_keys(self.root, self.prompt[: self.cover], page_size)
        full = len(self.keys)
        rest = self.prompt[full * page_size : self.cover]
        self.chain = [*self.keys, block_key(self.keys[-1] if full else self.root, rest)]
        """The keys, and one more for all that the prefill module covers, its last page included."""
        self.end_token_ids = end_token_ids
        self.output: list[int] = []
        self.usage: PromptUsage | None = None
        self.num_uncached = self.cover
        """Prompt tokens that the router expects to be computed for it."""
        self.prefill_engine = 0
        self.decode_engine = 0
        self.abort_requested = False
        self._page_size = page_size
        self._sink = sink
        self._on_finish = on_finish
        self._event_lock = threading.Lock()
        self._finished = False

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits for more of it; the owning thread should release its pages."""
        return self.abort_requested or self._finished

    @property
    def num_tokens(self) -> int:
        """Known tokens: the prompt's and the generated ones."""
        return len(self.prompt) + len(self.output)

    def known_tokens(self, start: int, stop: int) -> list[int]:
        """Known tokens at positions start..stop-1."""
        n = len(self.prompt)
        if start >= n:
            return self.output[start - n : stop - n]
        return self.prompt[start:stop] + self.output[: max(stop - n, 0)]

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return self.request.params.max_tokens - len(self.output)

    def cover_block(self, index: int) -> list[int]:
        """Tokens of page `index` of the part of the prompt that the prefill module covers."""
        start = index * self._page_size
        return self.prompt[start : min(start + self._page_size, self.cover)]

    def parent_key(self, index: int) -> bytes:
        """Chain key of the page before page `index`."""
        return self.keys[index - 1] if index else self.root

    def accept(self, tokens: list[int]) -> tuple[list[int], FinishReason | None]:
        """Takes in generated tokens, up to the first that ends the sequence.

        Returns those taken in, and the reason when the sequence has ended; `emit` is next.
        """
        accepted: list[int] = []
        for token in tokens:
            accepted.append(token)
            self.output.append(token)
            if token in self.end_token_ids:
                return accepted, FinishReason.STOP
            if self.remaining <= 0:
                return accepted, FinishReason.LENGTH
        return accepted, None

    def emit(
        self, tokens: list[int], logprobs: list[TokenLogprobs], reason: FinishReason | None
    ) -> None:
        """Emits the newest tokens; with a reason they are the last."""
        first = len(self.output) == len(tokens)
        self._emit(
            RequestOutput(
                request_id=self.request.id,
                token_ids=tuple(tokens),
                logprobs=tuple(logprobs[: len(tokens)]),
                usage=self.usage if first else None,
                finish_reason=reason,
                stop_token=tokens[-1] if reason is FinishReason.STOP else None,
            )
        )

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        """Ends the sequence without further tokens. Idempotent, from any thread."""
        self._emit(
            RequestOutput(
                request_id=self.request.id,
                usage=self.usage,
                finish_reason=reason,
                error=error,
            )
        )

    def _emit(self, event: RequestOutput) -> None:
        """Nothing follows the last event, even if another thread ends the sequence meanwhile."""
        with self._event_lock:
            if self._finished:
                return
            if event.finish_reason is not None:
                self._finished = True
                self._on_finish(self, event.finish_reason)
            try:
                self._sink(event)
            except Exception:
                # The engine's thread serves others too.
                logger.exception("the sink of request %s has failed", self.request.id)
                self.abort_requested = True
