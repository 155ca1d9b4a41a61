"""What changes results is used or refused by name: heads, dtypes, templates, windows, BOS."""

from __future__ import annotations

import functools
import json

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QuantizationType
from safetensors.numpy import load_file, save_file

from pshare_jax.convert.conversions import export, import_model, make_decoder
from pshare_jax.convert.orbax import load_weights
from pshare_jax.convert.sources import open_source
from pshare_jax.errors import CheckpointError
from pshare_jax.models.attention import CausalAttention
from pshare_jax.models.decoder import bind
from pshare_jax.text.tokenizer import Tokenizer
from tests.convert.helpers import (
    gguf_config,
    model_config,
    random_weights,
    same_bits,
    write_gguf,
    write_hf_folder,
)
from tests.convert.test_decoder import factors_for, write_peft
from tests.text.tiny import write_words

CONFIG = model_config()
WEIGHTS = random_weights(CONFIG)
TIED = model_config(tie_word_embeddings=True)
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


def rewrite(folder, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@functools.partial(jax.jit, static_argnums=0)
def logits(config, weights) -> jax.Array:
    tokens = jnp.asarray([[1, 5, 9, 300]])
    decoder = bind(config, weights)
    hidden = decoder.hidden(tokens, jnp.arange(4)[None], CausalAttention(config))
    return decoder.logits(hidden)


# A head of its own although the config ties it


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_head_that_differs_is_used(tmp_path, caplog, dtype):
    weights = random_weights(TIED, dtype=dtype)
    folder = write_hf_folder(tmp_path / "hf", TIED, weights)
    head = random_weights(CONFIG, seed=5, dtype=dtype)["lm_head.kernel"]
    rewrite(folder, lambda t: t.update({HEAD: np.ascontiguousarray(head.T)}))
    manifest = import_model(folder, tmp_path / "base")
    assert manifest.config == CONFIG
    expected = logits(CONFIG, {**weights, "lm_head.kernel": head})
    np.testing.assert_array_equal(logits(CONFIG, load_weights(tmp_path / "base")), expected)
    assert np.abs(expected - logits(TIED, weights)).max() > 0.05
    (line,) = caplog.messages
    assert line.startswith(f"{folder}/model.safetensors: lm_head.weight differs from the embedding")

    export(tmp_path / "base", tmp_path / "out")
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert about["tie_word_embeddings"] is False
    assert same_bits(load_file(tmp_path / "out" / "model.safetensors")[HEAD], head.T)


def test_a_head_that_differs_in_its_last_row_only(tmp_path, monkeypatch):
    monkeypatch.setattr("pshare_jax.convert.hf.COMPARED_ELEMENTS", 48 * 7)
    folder = write_hf_folder(tmp_path / "hf", TIED, random_weights(TIED))

    def change(tensors):
        tensors[HEAD] = tensors[EMBEDDING].copy()
        tensors[HEAD][-1, -1] += 1

    rewrite(folder, change)
    assert not open_source(folder).config.tie_word_embeddings


def test_an_equal_head_of_another_dtype_is_no_head(tmp_path, caplog):
    folder = write_hf_folder(tmp_path / "hf", TIED, random_weights(TIED, dtype="bfloat16"))
    rewrite(folder, lambda t: t.update({HEAD: t[EMBEDDING].astype(np.float32)}))
    assert open_source(folder).config == TIED
    assert caplog.messages == []


def test_a_head_of_another_shape_is_refused(tmp_path):
    folder = write_hf_folder(tmp_path / "hf", TIED, random_weights(TIED))
    rewrite(folder, lambda t: t.update({HEAD: np.zeros((7, 48), np.float32)}))
    with pytest.raises(CheckpointError, match=r"lm_head.weight has shape \[7, 48\]"):
        open_source(folder)


# Matrices of bfloat16 beside vectors of float32


def mixed(config) -> dict[str, np.ndarray]:
    """bfloat16 matrices, float32 norms and biases that bfloat16 does not hold."""
    weights = random_weights(config, seed=3)
    return {
        name: value.astype(ml_dtypes.bfloat16) if value.ndim > 1 else value
        for name, value in weights.items()
    }


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_mixed_dtypes_are_exact_in_float32(tmp_path, architecture):
    config = model_config(architecture=architecture)
    weights = mixed(config)
    folder = write_hf_folder(tmp_path / "hf", config, weights)
    assert import_model(folder, tmp_path / "base", dtype="float32").dtype == "float32"
    loaded = load_weights(tmp_path / "base")
    assert set(loaded) == set(weights)
    assert all(same_bits(loaded[n], v.astype(np.float32)) for n, v in weights.items())


def test_mixed_dtypes_are_exact_in_float32_from_gguf(tmp_path):
    config = gguf_config()
    weights = {n: v.astype(np.float32) for n, v in mixed(config).items()}
    write_gguf(tmp_path / "m.gguf", config, weights, QuantizationType.BF16)
    import_model(tmp_path / "m.gguf", tmp_path / "base", dtype="float32")
    loaded = load_weights(tmp_path / "base")
    assert all(same_bits(loaded[name], value) for name, value in weights.items())


def test_rounded_vectors_are_said(tmp_path, caplog):
    folder = write_hf_folder(tmp_path / "hf", CONFIG, mixed(CONFIG))
    assert import_model(folder, tmp_path / "base").dtype == "bfloat16"
    (line,) = caplog.messages
    assert line.startswith("5 tensors of float32 (layers.0.attn_norm.scale, ...) are rounded to")
    assert "--dtype float32" in line


def test_vectors_that_lose_nothing_are_not_mentioned(tmp_path, caplog):
    weights = random_weights(CONFIG, dtype="bfloat16")
    weights = {n: v if v.ndim > 1 else v.astype(np.float32) for n, v in weights.items()}
    folder = write_hf_folder(tmp_path / "hf", CONFIG, weights)
    assert import_model(folder, tmp_path / "base").dtype == "bfloat16"
    assert caplog.messages == []


def test_a_fine_tune_is_exact_on_a_base_of_float32(tmp_path):
    import_model(write_hf_folder(tmp_path / "hf", CONFIG, WEIGHTS), tmp_path / "base")
    tuned = mixed(CONFIG)
    write_hf_folder(tmp_path / "tuned", CONFIG, tuned)
    make_decoder(tmp_path / "base", tmp_path / "module", fine_tune=tmp_path / "tuned")
    loaded = load_weights(tmp_path / "module")
    assert all(same_bits(loaded[n], v.astype(np.float32)) for n, v in tuned.items())


# Chat templates

TOOL_USE = "tools: {{ tools | length }}"
MESSAGES = [{"role": "user", "content": "hello"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def check_templates(folder, default: str) -> None:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.apply_chat_template(MESSAGES) == default
    assert tokenizer.apply_chat_template(MESSAGES, TOOLS) == "tools: 1"


def test_further_chat_templates_are_kept(tmp_path):
    folder = write_hf_folder(tmp_path / "hf", CONFIG, WEIGHTS)
    default = Tokenizer.load(folder).apply_chat_template(MESSAGES)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TOOL_USE)
    import_model(folder, tmp_path / "base")
    check_templates(tmp_path / "base" / "tokenizer", default)
    export(tmp_path / "base", tmp_path / "out")
    check_templates(tmp_path / "out", default)


def test_named_chat_templates_of_a_gguf_are_kept(tmp_path):
    config = gguf_config()
    write_gguf(
        tmp_path / "m.gguf",
        config,
        random_weights(config),
        edit=lambda w: w.add_string("tokenizer.chat_template.tool_use", TOOL_USE),
    )
    default = Tokenizer.load(tmp_path / "source_tokenizer").apply_chat_template(MESSAGES)
    import_model(tmp_path / "m.gguf", tmp_path / "base")
    check_templates(tmp_path / "base" / "tokenizer", default)


# Windows that a GGUF file lost


@pytest.mark.parametrize(
    ("name", "theta", "window", "said"),
    [
        ("mistralai_Mistral-7B-v0.1", 10000.0, None, True),
        ("mistralai_Mistral-7B-v0.3", 1e6, None, False),
        ("mistralai_Mistral-7B-v0.1", 10000.0, 5, False),
        ("Llama-2-7B", 10000.0, None, False),
    ],
)
def test_a_lost_window_is_said(tmp_path, caplog, name, theta, window, said):
    config = gguf_config(rope_theta=theta, sliding_window=window)
    edit = lambda writer: writer.add_name(name)  # noqa: E731
    write_gguf(tmp_path / "m.gguf", config, random_weights(config), edit=edit)
    open_source(tmp_path / "m.gguf")
    assert [("whose sliding window of 4096 tokens" in m) for m in caplog.messages] == [True] * said


# Tokens around a text


def with_bos(folder, stated: bool, adds: bool):
    """A folder whose tokenizer files say this about the BOS token, id 0."""
    about = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**about, "add_bos_token": stated}))
    if adds:
        path = folder / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [],
            "special_tokens": {
                "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
            },
        }
        path.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("adds", [True, False])
def test_a_stated_bos_counts_on_both_routes(tmp_path, caplog, stated, adds):
    config = gguf_config()
    folder = write_hf_folder(tmp_path / "hf", config, random_weights(config))
    before = Tokenizer.load(folder).encode("hello world", add_special_tokens=False)
    with_bos(folder, stated, adds)
    import_model(folder, tmp_path / "base")
    write_gguf(
        tmp_path / "m.gguf",
        config,
        random_weights(config),
        edit=lambda writer: writer.add_add_bos_token(stated),
    )
    import_model(tmp_path / "m.gguf", tmp_path / "from_gguf")
    for base in ("base", "from_gguf"):
        tokenizer = Tokenizer.load(tmp_path / base / "tokenizer")
        assert tokenizer.encode("hello world") == [0] * stated + before
        assert tokenizer.encode("hello world", add_special_tokens=False) == before
    assert len(caplog.messages) == (stated != adds)
    untouched = (folder / "tokenizer.json").read_bytes()
    assert (stated == adds) == (
        (tmp_path / "base" / "tokenizer" / "tokenizer.json").read_bytes() == untouched
    )


def test_a_bos_that_is_not_declared_is_refused(tmp_path):
    folder = write_hf_folder(tmp_path / "hf", CONFIG, WEIGHTS)
    path = folder / "tokenizer_config.json"
    about = json.loads(path.read_text()) | {"bos_token": None, "add_bos_token": True}
    path.write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=r"add_bos_token is true, but bos_token is not"):
        open_source(folder)


# Messages that name cause and cure


def test_a_tokenizer_larger_than_the_embedding(tmp_path):
    config = model_config(vocab_size=99)
    folder = write_hf_folder(tmp_path / "hf", config, random_weights(config))
    write_words(folder)
    with pytest.raises(CheckpointError, match=r"has ids up to 99 \('w99'\), but config.json says"):
        open_source(folder)
    assert open_source(folder, tokenizer=False).config == config


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.lm_head.weight",
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.lm_head.base_layer.weight",
    ],
)
def test_a_resized_adapter(tmp_path, name):
    import_model(write_hf_folder(tmp_path / "hf", CONFIG, WEIGHTS), tmp_path / "base")
    folder = write_peft(tmp_path / "peft", factors_for("q"))
    path = folder / "adapter_model.safetensors"
    for rows, words in ((420, "no tokenizer.json that tells"), (400, "was made for another base")):
        save_file({**load_file(path), name: np.zeros((rows, 48), np.float32)}, path)
        with pytest.raises(CheckpointError, match=words):
            make_decoder(tmp_path / "base", tmp_path / "m", lora=folder)


def test_the_second_part_of_a_split_gguf(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.kv_data[0].pop("general.architecture")
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", 3)
    writer.add_tensor("blk.1.attn_q.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"is part 2 of 3, .*NAME-00002-of-00003\.gguf"):
        open_source(tmp_path / "m.gguf")
