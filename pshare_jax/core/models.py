"""What the cores know of a served model."""

from __future__ import annotations

from typing import Literal

import msgspec

from pshare_jax.core.split_rule import SplitRule

ModelKind = Literal["identity", "full", "lora"]
Sharing = Literal["shared", "isolated"]


class ModelSpec(msgspec.Struct, frozen=True):
    """A served model.

    Args:
        name: its id in the engine, never used again for other weights. It is the name that clients
            ask for, unless something else has gone by that name before.
        kind: what its decode module is.
        sharing: whether it reads the base's KV or prefills with its own weights.
        split_rule: which of a prompt's tokens the decode module reads itself.
        prefill_weights: name of the weights that prefill for it: the base's, or its own.
        namespace: names the KV that those weights write.
        group: models of one group are batched together.
        adapter: index among the group's stacked LoRA adapters, or -1.
        decode_workers: who can generate for it.
    """

    name: str
    kind: ModelKind
    sharing: Sharing
    split_rule: SplitRule
    prefill_weights: str
    namespace: str
    group: str
    adapter: int = -1
    decode_workers: tuple[str, ...] = ("decode0",)
