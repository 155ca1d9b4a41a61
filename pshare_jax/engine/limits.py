"""Checks of a serving configuration against a model, before anything large is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pshare_jax.config import ServeConfig
from pshare_jax.errors import ConfigError
from pshare_jax.kernels.backends import CPU_FFI, select_backend
from pshare_jax.kernels.kv_write import api as kv_write
from pshare_jax.kernels.native.library import require_library
from pshare_jax.kernels.page_transfer import api as page_transfer
from pshare_jax.kernels.paged_attention import api as paged_attention
from pshare_jax.models.config import ModelConfig
from pshare_jax.runtime.layout import PageLayout

DEFAULT_POOL_SEQUENCES = 8
"""Sequences of full length that a pool holds when its size is not configured."""


@dataclass(frozen=True)
class PoolSizes:
    """Pages of one prefill pool and of one decode pool, the padding page included; and of one pool
    that serves both."""

    prefill: int
    decode: int

    @property
    def shared(self) -> int:
        """The larger; a sequence that fills it needs one page more, for a copied end."""
        return max(self.prefill, self.decode) + 1


def check_config(config: ServeConfig, model: ModelConfig, layout: PageLayout) -> PoolSizes:
    """Checks everything that can be known without devices, and settles the pool sizes.

    Raises:
        ConfigError: names the key.
    """
    if config.page_size < 1:
        raise ConfigError(f"page_size: must be at least 1, is {config.page_size}")
    if not 2 <= config.max_model_len <= model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len: must be 2 .. {model.max_position_embeddings} (the model's), is "
            f"{config.max_model_len}"
        )
    if config.max_queue < 1:
        raise ConfigError(f"max_queue: must be at least 1, is {config.max_queue}")
    for side, values in (("prefill", config.prefill), ("decode", config.decode)):
        if values.engines < 1 or values.tensor_parallel < 1:
            raise ConfigError(f"{side}: engines and tensor_parallel must be at least 1")
    _check_buckets("prefill.chunk_buckets", config.prefill.chunk_buckets)
    _check_buckets("decode.batch_buckets", config.decode.batch_buckets)
    _check_buckets("decode.replay_buckets", config.decode.replay_buckets)
    if max(config.prefill.chunk_buckets) < config.page_size:
        raise ConfigError(
            f"prefill.chunk_buckets: the largest ({max(config.prefill.chunk_buckets)}) must hold "
            f"a page ({config.page_size} tokens)"
        )
    decode = config.decode
    if min(decode.max_num_seqs, decode.steps_per_dispatch, decode.group_quantum) < 1:
        raise ConfigError(
            "decode: max_num_seqs, steps_per_dispatch and group_quantum must be at least 1"
        )
    if min(decode.max_loras, decode.max_full) < 0 or decode.max_lora_rank < 1:
        raise ConfigError(
            "decode: max_loras and max_full must not be negative, max_lora_rank at least 1"
        )
    _check_sessions(config)
    _check_aliases(config)
    _check_backend(config)
    _check_store(config)
    _check_roles(config)
    longest = layout.pages_for(config.max_model_len)
    return PoolSizes(
        _pool_size("prefill.num_pages", config.prefill.num_pages, longest),
        _pool_size("decode.num_pages", config.decode.num_pages, longest),
    )


def _check_sessions(config: ServeConfig) -> None:
    if config.reply_kv == "while-decoding":
        raise ConfigError(
            "reply_kv: `while-decoding` is not implemented; `ahead` covers replies once they have "
            "ended, `off` not at all"
        )
    if not 0 <= config.sessions.pinned_share <= 1:
        raise ConfigError(
            f"sessions.pinned_share: must be 0 .. 1, is {config.sessions.pinned_share}"
        )
    if not 0 <= config.sessions.max_ttl_seconds < math.inf:
        raise ConfigError(
            "sessions.max_ttl_seconds: must be a number of seconds, 0 or more, is "
            f"{config.sessions.max_ttl_seconds}"
        )


def _check_aliases(config: ServeConfig) -> None:
    taken = {entry.name for entry in config.models}
    for entry in config.models:
        for alias in entry.aliases:
            if not alias or alias in taken:
                raise ConfigError(
                    f"models.{entry.name}.aliases: {alias!r} is empty, or a name that is used twice"
                )
            taken.add(alias)


def _check_backend(config: ServeConfig) -> None:
    name = config.kernel_backend
    tables = {
        "paged_attention": paged_attention.BACKENDS,
        "kv_write": kv_write.BACKENDS,
        "page_transfer": page_transfer.COPY,
    }
    for op, backends in tables.items():
        try:
            select_backend(op, backends, name)
        except ValueError as error:
            raise ConfigError(f"kernel_backend: {error}") from error
    if name != CPU_FFI:
        return
    for side, values in (("prefill", config.prefill), ("decode", config.decode)):
        if values.tensor_parallel > 1:
            raise ConfigError(
                f"kernel_backend: cpu_ffi runs on one device, but {side}.tensor_parallel is "
                f"{values.tensor_parallel}; leave it at `auto`, which then takes XLA"
            )
    require_library()


def _check_store(config: ServeConfig) -> None:
    store = config.kv_store
    if not store.path and (store.bytes or store.disk_path or store.disk_bytes):
        raise ConfigError("kv_store: needs a `path` in shared memory, such as /dev/shm/pshare-kv")
    for path, size in (("path", "bytes"), ("disk_path", "disk_bytes")):
        if getattr(store, path) and getattr(store, size) <= 0:
            raise ConfigError(
                f"kv_store.{size}: must be the size of the file {getattr(store, path)}, is "
                f"{getattr(store, size)}"
            )
    if store.prefetch != "off" and (not store.path or store.prefetch_bytes <= 0):
        raise ConfigError(
            "kv_store.prefetch: needs a `path`, and `prefetch_bytes` above 0 (it is "
            f"{store.prefetch_bytes})"
        )
    if config.router.policy == "load" and not store.path:
        raise ConfigError(
            "router.policy: `load` needs a `kv_store.path`: without a store each engine would "
            "compute prompts that another has"
        )
    if store.path and store.path == store.disk_path:
        raise ConfigError(f"kv_store: path and disk_path are the same file, {store.path}")


def _check_roles(config: ServeConfig) -> None:
    if config.router.roles == "fixed":
        return
    degrees = config.prefill.tensor_parallel, config.decode.tensor_parallel
    if degrees[0] != degrees[1]:
        raise ConfigError(
            "router.roles: with `flexible` a mesh does either, but prefill.tensor_parallel is "
            f"{degrees[0]} and decode.tensor_parallel {degrees[1]}"
        )
    for entry in config.models:
        if entry.decode_engines:
            raise ConfigError(
                f"models.{entry.name}.decode_engines: with router.roles `flexible` every mesh "
                "hosts every model"
            )


def _check_buckets(key: str, buckets: list[int]) -> None:
    if not buckets or min(buckets) < 1:
        raise ConfigError(f"{key}: needs at least one size, all positive; is {buckets}")


def _pool_size(key: str, num_pages: int, longest: int) -> int:
    if num_pages == 0:
        return DEFAULT_POOL_SEQUENCES * longest + 1
    if num_pages < longest + 1:
        raise ConfigError(
            f"{key}: {num_pages} pages cannot hold one sequence of max_model_len tokens; that "
            f"takes {longest + 1} (one is padding)"
        )
    return num_pages
