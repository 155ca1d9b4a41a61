"""Shapes and dtypes that `kernels` and `models` state are those that serving's programs have."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jaxtyping import TypeCheckError

from pshare_jax.config import DecodeConfig
from pshare_jax.kernels.experts import api as experts_api
from pshare_jax.kernels.kv_write import api as kv_write_api
from pshare_jax.kernels.page_transfer import api as page_transfer_api
from pshare_jax.kernels.paged_attention import api as paged_attention_api
from pshare_jax.kernels.shared_prefix_attention import api as shared_prefix_api
from pshare_jax.models.attention import CausalAttention, DenseCache, init_cache
from pshare_jax.models.decoder import bind
from pshare_jax.models.lora import LoraModule, stack_adapters
from pshare_jax.models.weights import abstract_weights, lora_specs, lora_targets, weight_specs
from pshare_jax.runtime.layout import PageLayout
from pshare_jax.runtime.programs import Call, Programs, Slot
from pshare_jax.runtime.steps import StepSpec
from tests.helpers import tiny_config
from tests.shapes import annotated, checked, checking

OPS = {
    experts_api: {"experts"},
    kv_write_api: {"kv_write"},
    page_transfer_api: {"gather_pages", "scatter_pages", "copy_pages", "page_checksums"},
    paged_attention_api: {"paged_attention"},
    shared_prefix_api: {"shared_prefix_attention"},
}


def test_every_array_of_an_op_has_a_shape():
    for module, names in OPS.items():
        for name in names:
            function = getattr(module, name)
            texts = function.__annotations__
            arrays = [key for key, text in texts.items() if "jax.Array" in text]
            assert arrays == [], f"{name}: {arrays}"
            documented = inspect.getdoc(function)
            assert documented is not None
            assert f"kernels.{module.__name__.split('.')[2]}.api.{name}" in annotated()


def programs(config) -> Programs:
    layout = PageLayout.of(config, 8, jnp.float32)
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("tensor",))
    decode = DecodeConfig(batch_buckets=[2], max_num_seqs=2, replay_buckets=[4], shared_prefix="on")
    return Programs(StepSpec(config, "xla", mesh), layout, mesh, 32, [4, 8], decode)


def abstract_adapters(config):
    """Two modules, stacked, as `jax.eval_shape` gives them."""
    targets = lora_targets(config)
    factors = abstract_weights(lora_specs(config, 4, targets), jnp.float32)
    return jax.eval_shape(
        lambda weights: stack_adapters([LoraModule(weights, 8.0, 4, targets)] * 2), factors
    )


def trace(made: Programs, call: Call, weights, adapters) -> None:
    """Traces a call of serving, and compiles nothing."""
    config, layout = made.spec.config, made.layout
    pool = (jax.ShapeDtypeStruct(layout.layer_shape(9), jnp.float32),) * config.num_layers
    given = {
        Slot.WEIGHTS: weights,
        Slot.ADAPTERS: adapters,
        Slot.POOL: pool,
        Slot.HISTORY: jax.eval_shape(made.history),
        Slot.STAGED: jax.ShapeDtypeStruct(made.staged_shape(call.size[0]), jnp.float32),
        # Steps that are not packed leave logits to the choice.
        Slot.LEFT: jax.ShapeDtypeStruct((call.size[0], config.vocab_size), jnp.float32),
    }
    arguments = [given[a] if isinstance(a, Slot) else a for a in call.arguments]
    jax.eval_shape(call.function, *arguments)


@pytest.mark.parametrize(
    ("architecture", "with_adapters"), [("llama", True), ("qwen3_moe", False), ("gemma2", False)]
)
def test_programs_of_serving_keep_to_them(architecture, with_adapters):
    config = tiny_config(architecture=architecture)
    weights = abstract_weights(weight_specs(config), jnp.float32)
    adapters = abstract_adapters(config) if with_adapters else None
    with checked() as called:
        made = programs(config)
        for calls in (
            made.prefill_calls(),
            made.sending_calls(),
            made.receiving_calls(),
            made.decode_calls(),
        ):
            for call in calls:
                trace(made, call, weights, adapters)
    expected = {
        "kernels.kv_write.api.kv_write",
        "kernels.paged_attention.api.paged_attention",
        "kernels.shared_prefix_attention.api.shared_prefix_attention",
        *(f"kernels.page_transfer.api.{name}" for name in OPS[page_transfer_api]),
        "models.rotation.rope_table",
        "models.rotation.apply_rope",
        "models.decoder.Decoder.hidden",
        "models.decoder.Decoder.logits",
        "models.decoder.Decoder.write_kv",
        "models.blocks.linear.RMSNorm.__call__",
    }
    if with_adapters:
        expected |= {"models.lora.Adapters.__init__", "models.lora.Adapters.update"}
    if architecture == "gemma2":
        expected.add("models.blocks.mlp.MLP.__call__")
    if architecture == "qwen3_moe":
        expected |= {"kernels.experts.api.experts", "models.blocks.experts.ExpertsMLP.__call__"}
    assert expected - called == set()


@pytest.mark.parametrize("dense", [True, False], ids=["cache", "causal"])
def test_the_oracles_attention_keeps_to_them(dense):
    config = tiny_config(architecture="gemma3")
    weights = abstract_weights(weight_specs(config), jnp.float32)
    tokens = jax.ShapeDtypeStruct((2, 6), jnp.int32)

    def logits(weights, tokens):
        attention = CausalAttention(config)
        if dense:
            attention = DenseCache(config, init_cache(config, 2, 8, jnp.float32), 1)
        decoder = bind(config, weights)
        return decoder.logits(decoder.hidden(tokens, tokens, attention))

    with checked() as called:
        out = jax.eval_shape(logits, weights, tokens)
    assert out.shape == (2, 6, config.vocab_size)
    assert {"models.attention.causal_mask", "models.attention.dense_attention"} <= called


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"page_table": jnp.zeros((3, 2), jnp.int32)}, "page_table"),
        ({"page_table": jnp.zeros((2, 2), jnp.float32)}, "page_table"),
        ({"q_lens": jnp.zeros((2, 1), jnp.int32)}, "q_lens"),
        ({"q": jnp.zeros((2, 1, 4, 8))}, "pages"),
        ({"pages": jnp.zeros((4, 3, 2, 4, 16))}, "pages"),
    ],
    ids=["batch", "dtype", "rank", "head_dim", "no K and V"],
)
def test_a_wrong_shape_is_refused_by_name(change, named):
    given = {
        "q": jnp.zeros((2, 1, 4, 16)),
        "pages": jnp.zeros((4, 2, 2, 4, 16)),
        "page_table": jnp.zeros((2, 2), jnp.int32),
        "q_start": jnp.zeros(2, jnp.int32),
        "q_lens": jnp.ones(2, jnp.int32),
    }
    attend = checking(paged_attention_api.paged_attention)
    assert jax.eval_shape(lambda: attend(**given, backend="xla")).shape == (2, 1, 4, 16)
    with pytest.raises(TypeCheckError, match=f"(?s)Actual value.*{named}"):
        jax.eval_shape(lambda: attend(**(given | change), backend="xla"))
