"""`adapter_config.json` of a PEFT folder: what of it counts, and what is refused by name."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pshare_jax.errors import CheckpointError

_REQUIRED = {"peft_type": ("LORA",), "bias": ("none", "lora_only", "all")}
"""Options with few meanings that are supported, the default first."""

_READ = {
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "alora_invocation_tokens",
    "layers_to_transform",
}
_WITHOUT_EFFECT = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "exclude_modules",
    "lora_dropout",
    "layers_pattern",
    "megatron_core",
    "eva_config",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
    # Which tensors there are says the same.
    "target_modules",
    "modules_to_save",
}
"""Options that steer training or loading and leave the adapted model as it is."""

_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base's weights alone."""

_PATTERN = re.compile(r"[\w.^$\\|()\[\]*+?-]{1,256}")
_NESTED = re.compile(r"\)[*+?{]")
MAX_REPEATS = 4
"""Of one pattern: matching takes time with this power of a name's length."""


@dataclass(frozen=True)
class AdapterOptions:
    """What counts of an `adapter_config.json`.

    Args:
        path: the file, for messages.
        rank: of adapters that no pattern names.
        alpha: the same.
        rank_stabilised: whether updates are multiplied by alpha / sqrt(rank), not alpha / rank.
        ranks: rank by pattern of a module's name.
        alphas: alpha by pattern.
        dora: whether columns of the adapted weights have magnitudes of their own.
        invocation: tokens from whose last occurrence in a prompt on the adapter acts; None for all.
        layers: the layers that have adapters; None for any.
    """

    path: Path
    rank: int
    alpha: float
    rank_stabilised: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    dora: bool
    invocation: tuple[int, ...] | None
    layers: tuple[int, ...] | None = None

    def rank_of(self, module: str) -> int:
        """The rank of the adapter on a module, such as `model.layers.0.self_attn.q_proj`."""
        return _of_pattern(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What its update `b @ a` is multiplied by."""
        rank, alpha = self.rank_of(module), _of_pattern(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def _of_pattern(values: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that the name or an end of it, from a dot on, matches."""
    for pattern, value in values.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def read_options(path: Path, options: Mapping[str, Any]) -> AdapterOptions:
    """The options in the file `path`, parsed.

    Raises:
        CheckpointError: names the option that is not supported.
    """

    def refuse(name: str, why: str = "is not supported") -> CheckpointError:
        return CheckpointError(f"{path}: {name}={reprlib.repr(options.get(name))} {why}")

    for name, allowed in _REQUIRED.items():
        if options.get(name, allowed[0]) not in allowed:
            raise refuse(name, f"is not supported, only {', '.join(map(repr, allowed))}")
    if options.get("init_lora_weights") not in _INITIALISATIONS:
        raise refuse("init_lora_weights", "is not supported: it changes the base's weights")
    known = {*_REQUIRED, *_READ, *_WITHOUT_EFFECT, "init_lora_weights"}
    for name, value in options.items():
        if name not in known and value not in (None, False, {}, []):
            raise refuse(name)
    rank, alpha = options.get("r"), options.get("lora_alpha")
    if not _is_rank(rank):
        raise refuse("r", "is not a rank")
    if not _is_alpha(alpha):
        raise refuse("lora_alpha", "is not a number")
    ranks, alphas = (options.get(name) or {} for name in ("rank_pattern", "alpha_pattern"))
    for name, values, fits in (
        ("rank_pattern", ranks, _is_rank),
        ("alpha_pattern", alphas, _is_alpha),
    ):
        if not isinstance(values, Mapping) or not all(map(fits, values.values())):
            raise refuse(name, "does not give a number for each pattern")
        if not all(map(_is_pattern, values)):
            raise refuse(name, "has a pattern that is no plain name or simple expression")
    tokens = options.get("alora_invocation_tokens")
    if tokens is not None and not (
        isinstance(tokens, list) and tokens and all(type(t) is int and t >= 0 for t in tokens)
    ):
        raise refuse("alora_invocation_tokens", "is no list of token ids")
    layers = options.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers
    if layers is not None and not (
        isinstance(layers, list) and all(type(layer) is int for layer in layers)
    ):
        raise refuse("layers_to_transform", "is no list of layers")
    return AdapterOptions(
        path,
        rank,  # type: ignore[arg-type]
        float(alpha),  # type: ignore[arg-type]
        bool(options.get("use_rslora")),
        ranks,
        alphas,
        bool(options.get("use_dora")),
        None if tokens is None else tuple(tokens),
        tuple(layers) if layers else None,
    )


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_pattern(pattern: Any) -> bool:
    """Whether it can be matched against a name in no time, whoever wrote it."""
    if not isinstance(pattern, str) or not _PATTERN.fullmatch(pattern) or _NESTED.search(pattern):
        return False
    if sum(pattern.count(c) for c in "*+?") > MAX_REPEATS:
        return False
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except re.error:
        return False
    return True
