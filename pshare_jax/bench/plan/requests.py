"""One call on its way through the simulated engines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from pshare_jax.bench.plan.chains import Key


@dataclass(eq=False)
class SimRequest:
    """A call of a model.

    Args:
        order: of arrival.
        model: the model's number.
        group: models of one group decode in one batch.
        chain: what names its prompt's KV in all pools.
        prompt: tokens.
        max_tokens: tokens to generate.
        on_finish: called when the last token is there.
        tail: prompt tokens that the decode module reads itself.

    Attributes:
        arrivals: when each generated token came.
        computed: prompt tokens that were prefilled for it.
        own: prompt tokens found that the same model had computed, when it was first covered.
        shared: prompt tokens found that another model had computed.
    """

    order: int
    model: int
    group: int
    chain: Key
    prompt: int
    max_tokens: int
    on_finish: Callable[[], None]
    tail: int = 1
    arrivals: list[float] = field(default_factory=list)
    computed: int = 0
    own: int = 0
    shared: int = 0
    num_uncached: int = 0
    prefill_engine: int = 0
    decode_engine: int = 0
    _routed: bool = False

    @property
    def cover(self) -> int:
        """Prompt tokens that the prefill module covers."""
        return max(self.prompt - self.tail, 0)

    @property
    def num_tokens(self) -> int:
        """Known tokens: the prompt's and the generated ones."""
        return self.prompt + len(self.arrivals)

    @property
    def remaining(self) -> int:
        """Tokens still to be generated."""
        return self.max_tokens - len(self.arrivals)

    def note_reused(self, origins: Counter[int]) -> None:
        """Tokens found in a prefill pool; those of a prefill after a preemption do not count."""
        if not self._routed:
            self._routed = True
            self.own = origins[self.model]
            self.shared = origins.total() - self.own
