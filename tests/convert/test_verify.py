"""`verify`: logit differences and KL against a plain computation."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pshare_jax.convert import hf, second_reader, sources, verify
from pshare_jax.convert.conversions import import_model, make_decoder
from pshare_jax.convert.streamed import Head, hidden_states
from pshare_jax.convert.tensors import DTYPES, LazyTensor, as_lazy, common_dtype
from pshare_jax.convert.verify import Model, compare, load_model, read_prompts
from pshare_jax.errors import CertificateError, CheckpointError
from pshare_jax.models.attention import CausalAttention
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.decoder import bind
from pshare_jax.text.tokenizer import Tokenizer
from tests.convert.helpers import model_config, random_weights, write_hf_folder
from tests.convert.test_decoder import factors_for, write_peft
from tests.helpers import ARCHITECTURES

CONFIG = model_config()
PROMPTS = ("hello world", "the quick brown fox, naïve 🙂", "x")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    weights = random_weights(CONFIG)
    root = tmp_path_factory.mktemp("verify")
    write_hf_folder(root / "hf", CONFIG, weights)
    import_model(root / "hf", root / "base")
    make_decoder(root / "base", root / "copy")
    write_peft(root / "peft", factors_for("q", "down"))
    make_decoder(root / "base", root / "lora", lora=root / "peft")
    return root


def changed(model: Model, scale: float) -> Model:
    head = model.tensors["lm_head.kernel"].read() * np.float32(scale)
    return dataclasses.replace(model, tensors={**model.tensors, "lm_head.kernel": as_lazy(head)})


def logits_of(model: Model, tokens: list[int]) -> np.ndarray:
    return plain(CONFIG, model, tokens)[1].astype(np.float64)


def plain(config: ModelConfig, model: Model, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Last hidden states and logits of a prompt, at once; padded, so that all have one program."""
    weights = {name: tensor.read() for name, tensor in model.tensors.items()}
    padded = np.zeros((1, 48), np.int32)
    padded[0, : len(tokens)] = tokens
    hidden, logits = _plain(config, weights, padded)
    return np.asarray(hidden)[0, : len(tokens)], np.asarray(logits)[0, : len(tokens)]


@functools.partial(jax.jit, static_argnums=0)
def _plain(config, weights, tokens):
    decoder = bind(config, weights)
    positions = jnp.arange(tokens.shape[1])[None]
    hidden = decoder.hidden(tokens, positions, CausalAttention(config))
    return hidden, decoder.logits(hidden)


def test_a_model_equals_itself_in_every_form(folder):
    base = load_model(folder / "base")
    for other in (load_model(folder / "hf"), load_model(folder / "copy", folder / "base")):
        difference = compare(base, other, PROMPTS)
        assert difference.largest == 0
        assert difference.mean_kl == 0
        assert difference.positions > 10
        assert difference.others == ()


def test_the_numbers_are_those_of_a_plain_computation(folder):
    a = load_model(folder / "base")
    b = changed(a, 30.0)
    tokenizer = Tokenizer.load(folder / "base" / "tokenizer")
    largest, kl = [], []
    for prompt in PROMPTS:
        tokens = tokenizer.encode(prompt)
        x, y = logits_of(a, tokens), logits_of(b, tokens)
        largest.append(np.abs(x - y).max())
        p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
        q = np.exp(y) / np.exp(y).sum(-1, keepdims=True)
        kl += list((p * np.log(p / q)).sum(-1))
    difference = compare(a, b, PROMPTS)
    assert difference.largest == pytest.approx(max(largest), rel=1e-4)
    assert difference.mean_kl == pytest.approx(np.mean(kl), rel=1e-3)
    assert difference.positions == len(kl)
    assert difference.largest > 0.1


def test_a_lora_module_is_merged_into_its_base(folder):
    base, module = load_model(folder / "base"), load_model(folder / "lora", folder / "base")
    factors = factors_for("q", "down")
    name = "layers.1.mlp.down"
    update = 8 / 4 * factors[f"{name}.lora_a"] @ factors[f"{name}.lora_b"]
    np.testing.assert_allclose(
        module.tensors[f"{name}.kernel"].read(),
        base.tensors[f"{name}.kernel"].read() + update,
        atol=1e-6,
    )
    difference = compare(base, module, PROMPTS)
    assert difference.largest > 1e-5
    assert difference.mean_kl > 0


def test_nan_is_a_difference(folder):
    base = load_model(folder / "base")
    difference = compare(base, changed(base, float("nan")), PROMPTS)
    assert np.isnan(difference.largest)
    assert not difference.largest <= 1.0


def test_long_prompts_are_cut(folder, monkeypatch):
    monkeypatch.setattr(verify, "MAX_TOKENS", 5)
    base = load_model(folder / "base")
    assert compare(base, base, ["hello world " * 50, "hello " * 60]).positions == 10


def test_what_cannot_be_compared_is_explained(folder, tmp_path):
    base = load_model(folder / "base")
    other = dataclasses.replace(base, config=model_config(vocab_size=500))
    with pytest.raises(CheckpointError, match="vocabularies of 416 and 500 tokens"):
        compare(base, other)
    bare = dataclasses.replace(base, tokenizer_files={})
    with pytest.raises(CheckpointError, match="neither model has a tokenizer"):
        compare(bare, bare)
    with pytest.raises(CheckpointError, match="is a LoRA module; name its base with --base"):
        load_model(folder / "lora")
    import_model(
        write_hf_folder(tmp_path / "hf", CONFIG, random_weights(CONFIG, seed=9)), tmp_path / "other"
    )
    with pytest.raises(CertificateError, match="is not the base"):
        load_model(folder / "copy", tmp_path / "other")


def test_prompts_are_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n  two\n")
    assert read_prompts(path) == ["one", "  two"]
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_prompts(path)
    path.write_text("\n \n")
    with pytest.raises(CheckpointError, match="has no prompts"):
        read_prompts(path)
    with pytest.raises(CheckpointError, match="No such file"):
        read_prompts(tmp_path / "none")


# What the import could get wrong is found, because verify does not read as the import does


def as_the_first_edition(monkeypatch) -> None:
    """The faults that the import once had."""

    def astype(self, dtype):
        natural = DTYPES[common_dtype(self.tensors)]
        wanted = DTYPES[dtype] if dtype else natural
        tensors = {n: t.astype(natural).astype(wanted) for n, t in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors)

    monkeypatch.setattr(hf, "with_saved_head", lambda folder, config: config)
    monkeypatch.setattr(sources.Source, "astype", astype)


def test_a_dropped_head_is_found(tmp_path, monkeypatch):
    tied = model_config(tie_word_embeddings=True)
    write_hf_folder(tmp_path / "hf", tied, random_weights(tied))
    path = tmp_path / "hf" / "model.safetensors"
    head = random_weights(CONFIG, seed=5)["lm_head.kernel"]
    save_file({**load_file(path), "lm_head.weight": np.ascontiguousarray(head.T)}, path)
    import_model(tmp_path / "hf", tmp_path / "right")
    right = compare(load_model(tmp_path / "right"), load_model(tmp_path / "hf"), PROMPTS)
    assert (right.largest, right.others) == (0, ())
    as_the_first_edition(monkeypatch)
    import_model(tmp_path / "hf", tmp_path / "wrong")
    wrong = load_model(tmp_path / "wrong")
    assert wrong.config.tie_word_embeddings
    assert compare(wrong, load_model(tmp_path / "hf"), PROMPTS).largest > 0.05


def test_rounded_norms_are_found(tmp_path, monkeypatch):
    weights = {
        name: value.astype(DTYPES["bfloat16"]) if value.ndim > 1 else 1 + value
        for name, value in random_weights(CONFIG).items()
    }
    write_hf_folder(tmp_path / "hf", CONFIG, weights)
    import_model(tmp_path / "hf", tmp_path / "right", dtype="float32")
    source = load_model(tmp_path / "hf")
    assert compare(load_model(tmp_path / "right"), source, PROMPTS).largest == 0
    as_the_first_edition(monkeypatch)
    import_model(tmp_path / "hf", tmp_path / "wrong", dtype="float32")
    difference = compare(load_model(tmp_path / "wrong"), source, PROMPTS)
    assert difference.largest > 1e-4


def drop_templates(files: Path) -> None:
    (files / "additional_chat_templates" / "tool_use.jinja").unlink()


def add_bos(files: Path) -> None:
    path = files / "tokenizer.json"
    about = json.loads(path.read_text())
    token = {"id": "<|endoftext|>", "type_id": 0}
    about["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": token}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {token["id"]: {"id": token["id"], "ids": [0], "tokens": [token["id"]]}},
    }
    path.write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (drop_templates, "the chat template gives another text with tools"),
        (add_bos, "the tokens of 'hello world' are "),
        (
            lambda f: (f / "generation_config.json").write_text('{"eos_token_id": 7}'),
            "the end tokens are (2, 0) and (7,)",
        ),
    ],
)
def test_text_that_differs_is_found(folder, tmp_path, change, found):
    source = Path(shutil.copytree(folder / "hf", tmp_path / "hf"))
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools | length }}")
    import_model(source, tmp_path / "base")
    base = load_model(tmp_path / "base")
    other = Path(shutil.copytree(tmp_path / "base" / "tokenizer", tmp_path / "files"))
    assert compare(base, load_model(source), PROMPTS).others == ()
    change(other)
    files = {p.relative_to(other).as_posix(): p.read_bytes() for p in other.rglob("*.*")}
    difference = compare(base, dataclasses.replace(base, tokenizer_files=files), PROMPTS)
    assert difference.largest == 0
    (line,) = difference.others
    assert line.startswith(found)


def test_a_window_beyond_the_prompts_is_found(folder):
    base = load_model(folder / "base")
    windowed = dataclasses.replace(base.config, sliding_window=4096)
    difference = compare(base, dataclasses.replace(base, config=windowed), PROMPTS)
    assert (difference.largest, difference.others) == (0, ("sliding_window is None and 4096",))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_family_is_the_plain_computation(tmp_path, architecture):
    """Layer by layer and in parts of the vocabulary."""
    config = model_config(architecture=architecture)
    write_hf_folder(tmp_path / "hf", config, random_weights(config))
    model = load_model(tmp_path / "hf")
    prompts = [[3, 5, 300, 7, 2], [9], list(range(20))]
    states = hidden_states(model.config, model.tensors, prompts)
    start = 0
    for prompt in prompts:
        hidden, logits = plain(config, model, prompt)
        mine = states[start : start + len(prompt)]
        np.testing.assert_allclose(mine, hidden, rtol=2e-5, atol=2e-6)
        head = Head(model.config, model.tensors)
        np.testing.assert_allclose(head.logits(mine), logits, rtol=2e-5, atol=2e-6)
        start += len(prompt)


def test_no_more_than_a_layer_is_held(folder):
    """Tensors are read once each, layer after layer, and let go."""
    base = load_model(folder / "base")
    alive: dict[str, weakref.ref] = {}
    most = 0

    def counted(name, tensor):
        def read():
            nonlocal most
            value = tensor.read()
            alive[name] = weakref.ref(value)
            most = max(most, sum(ref() is not None for ref in alive.values()))
            return value

        return LazyTensor(tensor.shape, tensor.dtype, read)

    tensors = {name: counted(name, tensor) for name, tensor in base.tensors.items()}
    hidden_states(base.config, tensors, [[1, 2, 3]])
    assert set(alive) == {name for name in tensors if not name.startswith("lm_head")}
    assert most <= 9 + 1


def test_a_tensor_without_a_place_is_refused(folder, tmp_path):
    source = Path(shutil.copytree(folder / "hf", tmp_path / "hf"))
    path = source / "model.safetensors"
    save_file({**load_file(path), "model.layers.0.extra": np.zeros(3, np.float32)}, path)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.extra has no place in the model"):
        second_reader.read_folder(source)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -4])
def test_the_second_reader_refuses_what_is_cut(folder, tmp_path, keep):
    source = Path(shutil.copytree(folder / "hf", tmp_path / "hf"))
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read|missing"):
        second_reader.read_folder(source)
