"""What a scripted host is made of, and the models that it serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pshare_jax.core.models import ModelSpec
from pshare_jax.core.split_rule import Invocation, LastTokens, SplitRule

PAGE = 4


INVOKED_BY = (7, 7)
"""Tokens from which on the model `alora` reads a prompt itself."""


def model_specs(decode_workers: Sequence[str]) -> dict[str, ModelSpec]:
    """One model of every kind; `isolated` is hosted by the last decode worker alone."""

    def spec(name: str, kind: Any, rule: SplitRule, group: str, adapter: int = -1) -> ModelSpec:
        hosts = tuple(decode_workers)
        return ModelSpec(name, kind, "shared", rule, "base", "base", group, adapter, hosts)

    last = tuple(decode_workers[-1:])
    specs = [
        spec("identity", "identity", LastTokens(1), "base"),
        spec("lora", "lora", LastTokens(1), "base", 0),
        spec("alora", "lora", Invocation(INVOKED_BY), "base", 1),
        spec("full", "full", LastTokens(5), "full"),
        ModelSpec(
            "isolated", "full", "isolated", LastTokens(2), "own", "own", "isolated", -1, last
        ),
    ]
    return {spec.name: spec for spec in specs}


@dataclass(frozen=True)
class Setting:
    """What a host is made of. `wire` sends messages through their encoding, `reply_ahead` covers
    replies before anybody asks; with a `store` prefill workers write pages to it and fetch them, so
    many `prefetched` ones before anybody asks. With `unasked` they put pages on offer before
    they are asked. Meshes that may do `either` are as many as there are
    prefill and decode workers; each has one of both, of which one works. With `lends` workers give
    pages to prefill workers that lack them. With `balanced` waiting
    tokens at each prefill worker they change by themselves."""

    prefill: int = 1
    decode: int = 1
    one_pool: bool = False
    either: bool = False
    balanced: int = 0
    prefill_pages: int = 24
    decode_pages: int = 24
    steps_ahead: int = 1
    steps_per_dispatch: int = 1
    max_num_seqs: int = 4
    wire: bool = True
    store: bool = False
    lends: bool = False
    unasked: bool = False
    prefetched: int = 0
    reply_ahead: bool = False
    streaming_step: int = 0
    pinned_share: float = 0.5
    chunk_buckets: tuple[int, ...] = (4, 8)

    @property
    def num_decode(self) -> int:
        """Decode workers, those that rest included."""
        return self.prefill + self.decode if self.either else self.decode
