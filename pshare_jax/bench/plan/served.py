"""The simulated counterpart of a serving configuration on one CPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pshare_jax.bench.plan.costs import CostModel
from pshare_jax.bench.plan.specs import EngineSpec, ServerSpec
from pshare_jax.config import ServeConfig
from pshare_jax.config_files import load_serve_config
from pshare_jax.errors import ConfigError

DEFAULT_POOL_SEQUENCES = 8
"""As in `pshare_jax.engine.limits`, which a test compares."""


def load_server(file: str, args: Sequence[str]) -> ServeConfig:
    """A serving configuration as `bench agents` starts it.

    Raises:
        ConfigError: it cannot be read.
    """
    if not Path(file).is_file():
        raise ConfigError(f"there is no configuration file {file}")
    return load_serve_config(file, *args)


def is_lora(config: ServeConfig) -> bool:
    """Whether there are LoRA modules, whose steps take longer.

    Raises:
        ConfigError: there are full ones too, which the simulation does not know; or a checkpoint
            is not there.
    """
    kinds = {_kind(entry.checkpoint) for entry in config.models}
    if "full" in kinds and len(kinds) > 1:
        raise ConfigError(
            f"models: all full, or none, can be simulated, not {', '.join(sorted(kinds))}"
        )
    return "lora" in kinds


def is_one_group(config: ServeConfig) -> bool:
    """Whether all models decode in one batch, as LoRA modules and the base do.

    Raises as `is_lora`.
    """
    return is_lora(config) or all(entry.checkpoint == "identity" for entry in config.models)


def _kind(checkpoint: str) -> str:
    if checkpoint == "identity":
        return "identity"
    about = Path(checkpoint) / "pshare.json"
    if not about.is_file():
        raise ConfigError(f"models: there is no {about}, which says whether it is a LoRA module")
    return (json.loads(about.read_text()).get("certificate") or {}).get("kind", "full")


def server_spec(config: ServeConfig, models: int, costs: CostModel, processor: int) -> ServerSpec:
    """The first `models` models of a server whose engines all compute on one processor.

    Raises:
        ConfigError: fewer models are served, or they share in part.
    """
    entries = config.models[:models]
    if len(entries) < models:
        raise ConfigError(f"models: {models} are needed, {len(entries)} are served")
    kinds = {entry.sharing for entry in entries}
    if len(kinds) > 1:
        raise ConfigError("models: all shared or all isolated can be simulated, not some of each")
    longest = -(-config.max_model_len // config.page_size)
    default = DEFAULT_POOL_SEQUENCES * longest + 1
    prefill, decode = config.prefill, config.decode
    return ServerSpec(
        models=range(models),
        shared=kinds == {"shared"},
        one_group=is_one_group(config),
        page_size=config.page_size,
        chunk_buckets=prefill.chunk_buckets,
        settings=decode,
        prefill=[EngineSpec(costs, prefill.num_pages or default, processor)] * prefill.engines,
        decode=[
            EngineSpec(
                costs,
                decode.num_pages or default,
                processor,
                [m for m, e in enumerate(entries) if not e.decode_engines or i in e.decode_engines],
            )
            for i in range(decode.engines)
        ],
    )
