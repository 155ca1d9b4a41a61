"""What servers in virtual time are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pshare_jax.bench.plan.costs import CostModel
from pshare_jax.bench.plan.store import StoreSpec
from pshare_jax.config import DecodeConfig, RoutingPolicy
from pshare_jax.core.balance import BalancePolicy


@dataclass(frozen=True)
class EngineSpec:
    """One engine: what its work costs, its pages, and the processor that computes it.

    `models` are those that a decode engine hosts; empty is all of its server.
    """

    costs: CostModel
    num_pages: int
    processor: int
    models: Sequence[int] = ()


@dataclass(frozen=True)
class ServerSpec:
    """One server.

    Args:
        models: numbers of the models that are asked here.
        shared: whether they share one prefill.
        one_group: whether they decode in one batch, as LoRA modules do.
        page_size: tokens of a page.
        chunk_buckets: compiled chunk lengths.
        settings: batch sizes and limits of the decode engines.
        prefill: its prefill engines.
        decode: its decode engines.
        tail: prompt tokens that decode modules read themselves.
        reply_ahead: whether replies are covered before anybody asks.
        store: the KV store, if there is one.
        routing: how prefill engines are chosen, see `Router`.
        either: where meshes may do either, how many of `decode` begin with prefill; there is no
            `prefill` then.
        moves: whether rows take their KV along when such a mesh is given to prefill.
        balance: when such meshes change by themselves, if they do.
    """

    models: Sequence[int]
    shared: bool
    one_group: bool
    page_size: int
    chunk_buckets: Sequence[int]
    settings: DecodeConfig
    prefill: Sequence[EngineSpec]
    decode: Sequence[EngineSpec]
    tail: int = 1
    reply_ahead: bool = False
    store: StoreSpec | None = None
    routing: RoutingPolicy = "prefix"
    either: int = 0
    moves: bool = True
    balance: BalancePolicy | None = None


@dataclass(frozen=True)
class SystemSpec:
    """Servers side by side.

    Args:
        servers: each model is asked at the one that has it.
        call_seconds: of each call outside the engines: HTTP, tokens to text, the way there.
    """

    servers: Sequence[ServerSpec]
    call_seconds: float = 0.0
