from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import pytest

from pshare_jax.config import DecodeConfig, ModelEntry, PrefillConfig, ServeConfig
from pshare_jax.core.split_rule import LastTokens
from pshare_jax.engine.limits import DEFAULT_POOL_SEQUENCES, PoolSizes, check_config
from pshare_jax.engine.sources import BaseSource, ModelSource, model_specs
from pshare_jax.errors import ConfigError
from pshare_jax.models.split import Certificate
from pshare_jax.runtime.layout import PageLayout
from tests.engine.harness import loader, serve_config
from tests.helpers import tiny_config

MODEL = tiny_config()


def check(config: ServeConfig) -> PoolSizes:
    return check_config(config, MODEL, PageLayout.of(MODEL, max(config.page_size, 1), jnp.float32))


def test_pool_sizes() -> None:
    assert check(serve_config()) == PoolSizes(40, 28)
    config = serve_config(prefill=PrefillConfig(chunk_buckets=[16]), decode=DecodeConfig())
    longest = 128 // 8
    assert check(config) == PoolSizes(*[DEFAULT_POOL_SEQUENCES * longest + 1] * 2)
    # The smallest pool that can serve anything.
    assert check(replace(config, decode=DecodeConfig(num_pages=longest + 1))).decode == longest + 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"page_size": 0}, "page_size"),
        ({"max_model_len": 1}, "max_model_len"),
        ({"max_model_len": 10**6}, f"max_model_len.*{MODEL.max_position_embeddings}"),
        ({"max_queue": 0}, "max_queue"),
        ({"kernel_backend": "cuda9"}, "kernel_backend.*cuda9"),
        (
            {"kernel_backend": "cpu_ffi", "decode": {"tensor_parallel": 2}},
            "kernel_backend: cpu_ffi .* one device, but decode.tensor_parallel is 2",
        ),
        ({"prefill": {"engines": 0}}, "prefill: engines"),
        ({"prefill": {"tensor_parallel": 0}}, "prefill: engines and tensor_parallel"),
        ({"decode": {"engines": -1}}, "decode: engines"),
        ({"decode": {"tensor_parallel": 0}}, "decode: engines and tensor_parallel"),
        ({"prefill": {"chunk_buckets": []}}, "prefill.chunk_buckets"),
        ({"prefill": {"chunk_buckets": [0, 16]}}, "prefill.chunk_buckets"),
        ({"prefill": {"chunk_buckets": [4]}}, "prefill.chunk_buckets: the largest"),
        ({"decode": {"batch_buckets": []}}, "decode.batch_buckets"),
        ({"decode": {"replay_buckets": [-1]}}, "decode.replay_buckets"),
        ({"decode": {"max_num_seqs": 0}}, "max_num_seqs"),
        ({"decode": {"steps_per_dispatch": 0}}, "steps_per_dispatch"),
        ({"prefill": {"num_pages": 16}}, "prefill.num_pages.*17"),
        ({"decode": {"num_pages": 16}}, "decode.num_pages.*17"),
        ({"decode": {"num_pages": -1}}, "decode.num_pages"),
        ({"models": [ModelEntry("a", aliases=[""])]}, "models.a.aliases: '' is empty"),
        ({"models": [ModelEntry("a", aliases=["b"]), ModelEntry("b")]}, "models.a.aliases: 'b'"),
        ({"models": [ModelEntry("a", aliases=["c", "c"])]}, "models.a.aliases: 'c' .* twice"),
    ],
)
def test_what_cannot_be_served_is_refused_by_key(overrides: dict[str, Any], message: str) -> None:
    config = serve_config()
    for key, value in overrides.items():
        new = replace(getattr(config, key), **value) if isinstance(value, dict) else value
        config = replace(config, **{key: new})
    with pytest.raises(ConfigError, match=message):
        check(config)


BASE = BaseSource(MODEL, "print", loader({}))
LORA = Certificate("print", 3, "lora", True, "own", 2, 4.0, ("q",))


def source(name: str, **fields: Any) -> ModelSource:
    return ModelSource(
        name, fields.pop("kind", "identity"), fields.pop("sharing", "shared"), loader({}), **fields
    )


def test_model_specs() -> None:
    table = model_specs(
        BASE,
        [
            source("plain"),
            source("first", kind="lora", certificate=LORA, decode_engines=(1,)),
            source(
                "own",
                kind="full",
                sharing="isolated",
                certificate=Certificate("print", 2, "full", True, "x"),
            ),
            source("second", kind="lora", certificate=LORA),
            source("whole", kind="full", certificate=Certificate("print", 2, "full", True, "x")),
            source("apart", sharing="isolated"),
            source("lora-apart", kind="lora", sharing="isolated", certificate=LORA),
        ],
        2,
    )
    rules = [table[name].split_rule for name in ("plain", "first", "own")]
    assert rules == [LastTokens(1), LastTokens(3), LastTokens(2)]
    assert table["plain"].namespace == table["first"].namespace == "print"
    isolated = {table[name].namespace for name in ("own", "apart", "lora-apart")}
    assert len(isolated - {"print"}) == 3
    # The base is the base, isolated or not; other isolated models have weights of their own.
    base = table["plain"].prefill_weights
    assert [name for name in table if table[name].prefill_weights != base] == ["own", "lora-apart"]
    assert table["own"].prefill_weights != table["lora-apart"].prefill_weights
    # The base and LoRA modules decode together, full modules each on its own.
    group = table["plain"].group
    assert [name for name in table if table[name].group != group] == ["own", "whole"]
    assert table["own"].group != table["whole"].group
    assert [table[name].adapter for name in table] == [-1, 0, -1, 1, -1, -1, 2]
    assert [table[name].decode_workers for name in ("plain", "first")] == [
        ("decode0", "decode1"),
        ("decode1",),
    ]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "at least one model"),
        ([source("")], "models"),
        ([source("a"), source("a")], "'a'"),
        ([source("a", decode_engines=(2,))], r"models\.a\.decode_engines: 2"),
        ([source("a", decode_engines=(-1,))], r"models\.a\.decode_engines: -1"),
    ],
)
def test_model_tables_that_cannot_be_served(sources: list[ModelSource], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_specs(BASE, sources, 2)


def test_entries_default_to_the_base() -> None:
    assert ModelEntry("a").checkpoint == "identity"
