"""KV of 8 bits in the engine: the oracle's tokens, from KV with a name of its own."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from pshare_jax.config import (
    DecodeConfig,
    KvStoreConfig,
    ModelEntry,
    PrefillConfig,
    ServeConfig,
)
from pshare_jax.convert.conversions import import_model
from pshare_jax.engine.devices import page_dtype
from pshare_jax.engine.kv_store import EngineStore
from pshare_jax.engine.monolithic import Monolithic
from pshare_jax.engine.shape import dtype_of_pages
from pshare_jax.engine.sources import checkpoint_sources, model_specs
from pshare_jax.errors import ConfigError
from pshare_jax.kernels.kv_dtype import FP8
from pshare_jax.runtime.layout import PageLayout
from tests.convert.helpers import model_config, random_weights, write_hf_folder
from tests.engine.harness import MAX_LEN, Models, lora_module, running, serve_config
from tests.engine.test_kv_store import FREE, served
from tests.helpers import tiny_config


@pytest.mark.parametrize("backend", ["cpu_ffi", "xla"])
def test_greedy_tokens_are_the_oracles(backend: str) -> None:
    """The oracle's dense cache is of 8 bits too."""
    models = Models(tiny_config(architecture="qwen3"))
    models.add_identity("identity")
    models.add_full("full", 1, tail=2)
    models.add_lora("lora", lora_module(models.config, 3, rank=2, targets=("q", "v", "down")))
    models.__dict__["oracle"] = Monolithic(models.config, MAX_LEN, FP8)
    context = np.random.default_rng(0).integers(0, 256, 41).tolist()
    prompts = [tuple(context[:n]) for n in (1, 9, 41)]
    config = serve_config(
        kv_dtype="fp8",
        kernel_backend=backend,
        prefill=PrefillConfig(chunk_buckets=[16], num_pages=40),
        decode=DecodeConfig(batch_buckets=[4], max_num_seqs=8, replay_buckets=[4], num_pages=40),
    )
    with running(models, config) as client:
        names = ("identity", "full", "lora")
        asked = [(name, prompt) for prompt in prompts for name in names]
        replies = [client.submit(name, prompt, 5) for name, prompt in asked]
        for reply in replies:
            reply.wait(120)
        client.check_idle()
    for (name, prompt), reply in zip(asked, replies, strict=True):
        assert reply.tokens == models.expected(name, prompt, 5), (name, len(prompt))


def test_a_store_gives_its_pages_back(tmp_path, monkeypatch) -> None:
    """As they are, without a codec: another engine computes nothing."""
    monkeypatch.setattr(EngineStore, "_measure", lambda self, tiers: FREE)
    models = Models(tiny_config(architecture="qwen3"))
    models.add_identity("identity")
    prompt = tuple(np.random.default_rng(1).integers(0, 256, 41).tolist())
    config = serve_config(
        kv_dtype="fp8",
        kv_store=KvStoreConfig(path=str(tmp_path / "pool"), bytes=4 << 20),
        prefill=PrefillConfig(chunk_buckets=[16], num_pages=20),
        decode=DecodeConfig(batch_buckets=[1], replay_buckets=[4], num_pages=20),
    )
    replies = []
    for _ in range(2):
        with served(models, config) as client:
            replies.append(client.generate("identity", prompt))
    first, second = (reply.usage for reply in replies)
    assert (first.computed_tokens, second.computed_tokens) == (40, 0)
    assert replies[0].tokens == replies[1].tokens


def test_its_kv_has_a_name_of_its_own(tmp_path) -> None:
    config = model_config()
    import_model(
        write_hf_folder(tmp_path / "hf", config, random_weights(config)), tmp_path / "base"
    )
    plain = ServeConfig(base=str(tmp_path / "base"), models=[ModelEntry("base", "identity")])
    names = {}
    for weights in ("plain", "int8"):
        for kv in ("auto", "fp8"):
            config = dataclasses.replace(plain, weights=weights, kv_dtype=kv)
            base, sources = checkpoint_sources(config, "float32")
            names[weights, kv] = {s.namespace for s in model_specs(base, sources, 1).values()}
    print_ = base.fingerprint
    assert names == {
        ("plain", "auto"): {print_},
        ("plain", "fp8"): {f"{print_}/kv-fp8"},
        ("int8", "auto"): {f"{print_}/int8"},
        ("int8", "fp8"): {f"{print_}/int8/kv-fp8"},
    }


def test_a_token_takes_a_byte_a_value(monkeypatch) -> None:
    config = serve_config(kv_dtype="fp8")
    layout = PageLayout.of(tiny_config(), 8, page_dtype(config))
    assert layout.bytes_per_token == 2 * 2 * 2 * 16
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(ConfigError, match="kv_dtype: the kernels for TPUs do not read fp8"):
        page_dtype(config)


def test_pages_of_8_bits_say_what_was_computed_in() -> None:
    """A worker that computes in float32 does not read what another has rounded from bfloat16."""
    said = [dtype_of_pages("float8_e4m3fn", computed) for computed in ("float32", "bfloat16")]
    assert said == ["float8_e4m3fn of float32", "float8_e4m3fn of bfloat16"]
    assert dtype_of_pages("bfloat16", "bfloat16") == "bfloat16"
