from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.convert.names import (
    hf_shape,
    hf_tensors,
    hf_to_native,
    is_redundant,
    native_to_hf,
    read_native,
    to_hf,
    to_native,
    write_hf,
)
from pshare_jax.errors import CheckpointError
from pshare_jax.models.weights import lora_specs, lora_targets, weight_specs
from tests.helpers import FAMILIES, tiny_config


def random_of(specs):
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(spec.shape, np.float32) for name, spec in specs.items()}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_weight_has_tensors_and_a_layout_on_both_sides(architecture):
    config = tiny_config(architecture=architecture)
    weights = random_of(weight_specs(config))
    written = {name: write_hf(name, config, weights.__getitem__) for name in hf_tensors(config)}
    assert {name: array.shape for name, array in written.items()} == {
        name: tensor.shape for name, tensor in hf_tensors(config).items()
    }
    assert sum(array.size for array in written.values()) == sum(w.size for w in weights.values())
    for name, weight in weights.items():
        np.testing.assert_array_equal(read_native(name, config, written.__getitem__), weight)


@pytest.mark.parametrize("architecture", [name for name in FAMILIES if name != "phi3"])
def test_every_factor_has_a_name_and_a_layout_on_both_sides(architecture):
    config = tiny_config(architecture=architecture)
    factors = random_of(lora_specs(config, 3, lora_targets(config)))
    names = set()
    for name, factor in factors.items():
        hf_name, hf = native_to_hf(name, config), to_hf(name, factor, config)
        assert hf_to_native(hf_name, config) == name
        assert hf.shape == hf_shape(name, config, rank=3)
        np.testing.assert_array_equal(to_native(name, hf, config), factor)
        names.add(hf_name)
    assert len(names) == len(factors)


def test_fused_and_grouped_tensors():
    phi3 = tiny_config(architecture="phi3")
    assert hf_tensors(phi3)["model.layers.1.self_attn.qkv_proj.weight"].shape == (128, 48)
    assert hf_tensors(phi3)["model.layers.0.mlp.gate_up_proj.weight"].shape == (128, 48)
    assert native_to_hf("layers.1.attn.v.kernel", phi3).endswith("1.self_attn.qkv_proj.weight")
    # PEFT would adapt the fused projection, which is three of ours.
    with pytest.raises(CheckpointError, match="PEFT has no name for it"):
        native_to_hf("layers.0.attn.q.lora_a", phi3)
    assert native_to_hf("layers.0.attn.o.lora_a", phi3).endswith("o_proj.lora_A.weight")
    assert hf_to_native("model.layers.0.self_attn.qkv_proj.lora_A.weight", phi3) is None
    oss = tiny_config(architecture="gpt_oss")
    assert hf_tensors(oss)["model.layers.1.mlp.experts.gate_up_proj"].shape == (4, 48, 128)
    assert hf_tensors(oss)["model.layers.0.mlp.experts.down_proj_bias"].shape == (4, 48)
    both = np.arange(4 * 128).reshape(4, 128)
    for start, target in enumerate(("gate", "up")):
        part = read_native(f"layers.0.experts.{target}.bias", oss, lambda _: both)
        np.testing.assert_array_equal(part, both[:, start::2])
    mixtral = tiny_config(architecture="mixtral")
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    assert hf_tensors(mixtral)[name].shape == (48, 64)
    with pytest.raises(CheckpointError, match=r"experts\.3\.w2\.weight: shape \[64, 48\] in"):
        read_native(
            "layers.1.experts.down.kernel",
            mixtral,
            lambda n: np.zeros((64, 48) if n == name else (48, 64)),
        )


def test_lora_on_experts_is_refused_by_name():
    with pytest.raises(CheckpointError, match=r"LoRA on up: a mixtral with experts .* q, k, v, o"):
        lora_specs(tiny_config(architecture="mixtral"), 2, ("q", "up"))


def test_layouts_compute_the_same():
    """Hugging Face computes `x @ W.T` over flat heads; the native kernel gives heads apart."""
    config = tiny_config()
    e, h, d = config.hidden_size, config.num_heads, config.head_dim
    rng = np.random.default_rng(0)
    q_proj, o_proj = rng.standard_normal((h * d, e)), rng.standard_normal((e, h * d))
    lora_a, lora_b = rng.standard_normal((3, h * d)), rng.standard_normal((e, 3))
    x, heads = rng.standard_normal(e), rng.standard_normal((h, d))

    q = np.tensordot(x, to_native("layers.0.attn.q.kernel", q_proj, config), 1)
    np.testing.assert_allclose(q, (q_proj @ x).reshape(h, d))
    o = np.tensordot(heads, to_native("layers.0.attn.o.kernel", o_proj, config), 2)
    np.testing.assert_allclose(o, o_proj @ heads.reshape(-1))
    low = np.tensordot(heads, to_native("layers.0.attn.o.lora_a", lora_a, config), 2)
    update = np.tensordot(low, to_native("layers.0.attn.o.lora_b", lora_b, config), 1)
    np.testing.assert_allclose(update, lora_b @ (lora_a @ heads.reshape(-1)))


def test_names():
    config = tiny_config()
    assert hf_to_native("model.layers.1.self_attn.q_proj.weight", config) == (
        "layers.1.attn.q.kernel"
    )
    assert hf_to_native("model.layers.0.mlp.gate_proj.lora_A.weight", config) == (
        "layers.0.mlp.gate.lora_a"
    )
    assert hf_to_native("lm_head.weight", config) == "lm_head.kernel"
    for unknown in (
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "transformer.h.0.attn.weight",
    ):
        assert hf_to_native(unknown, config) is None
        assert not is_redundant(unknown, config)


def test_redundant_tensors():
    tied = tiny_config(tie_word_embeddings=True)
    assert hf_to_native("lm_head.weight", tied) is None
    assert is_redundant("lm_head.weight", tied)
    assert not is_redundant("lm_head.weight", tiny_config())
    assert is_redundant("model.layers.0.self_attn.rotary_emb.inv_freq", tied)


def test_a_misshapen_tensor_is_named():
    config = tiny_config()
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight: shape \[48, 64\]"):
        to_native("layers.0.mlp.up.kernel", np.zeros((48, 64)), config)
    with pytest.raises(CheckpointError, match=r"down_proj\.lora_B\.weight: shape \[49, 3\]"):
        to_native("layers.0.mlp.down.lora_b", np.zeros((49, 3)), config)
    with pytest.raises(CheckpointError, match=r"layers\.9\.mlp\.up\.kernel: no such weight"):
        native_to_hf("layers.9.mlp.up.kernel", config)


def test_layouts_work_on_jax_arrays_and_keep_the_dtype():
    config = tiny_config()
    tensor = jnp.zeros((64, 48), jnp.bfloat16)
    kernel = to_native("layers.0.mlp.up.kernel", tensor, config)
    assert kernel.dtype == jnp.bfloat16
    assert to_hf("layers.0.mlp.up.kernel", kernel, config).shape == tensor.shape
