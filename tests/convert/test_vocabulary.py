"""Fine-tunes whose vocabulary was resized, and bases whose head is untied."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from pshare_jax.convert.conversions import export, import_model, make_decoder
from pshare_jax.convert.orbax import load_weights, read_manifest
from pshare_jax.errors import CheckpointError
from pshare_jax.text.tokenizer import Tokenizer
from tests.convert.helpers import model_config, random_weights, same_bits, write_hf_folder
from tests.convert.test_decoder import OPTIONS, PREFIX

ROWS = 416
"""Of the base; its tokenizer fills fewer."""
TIED = model_config(tie_word_embeddings=True)
UNTIED = model_config()
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERIES = "model.layers.0.self_attn.q_proj"


def fine_tune(folder: Path, config, rows: int, seed: int = 1) -> Path:
    bigger = model_config(vocab_size=rows, tie_word_embeddings=config.tie_word_embeddings)
    return write_hf_folder(folder, bigger, random_weights(bigger, seed))


def add_token(folder: Path, token: str, number: int) -> None:
    """Gives the next free ids up to `number` names, the last of them `token`."""
    path = folder / "tokenizer.json"
    tokenizer = FastTokenizer.from_file(str(path))
    while (count := len(tokenizer.get_vocab(with_added_tokens=True))) < number:
        tokenizer.add_tokens([AddedToken(f"<|spare {count}|>", normalized=False)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False)])
    assert tokenizer.token_to_id(token) == number
    tokenizer.save(str(path))


def full_base(folder: Path, config=TIED, **options) -> Path:
    """A base whose every row has a token."""
    source = write_hf_folder(folder.with_name("source"), config, random_weights(config))
    add_token(source, "<|last|>", ROWS - 1)
    import_model(source, folder, **options)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return full_base(tmp_path_factory.mktemp("vocabulary") / "base")


@pytest.fixture(scope="module")
def untied_base(tmp_path_factory):
    return full_base(tmp_path_factory.mktemp("vocabulary") / "base", UNTIED)


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_rows_of_padding_are_left_out(base, untied_base, tmp_path, config, caplog):
    tuned = fine_tune(tmp_path / "tuned", config, ROWS + 24)
    add_token(tuned, "<|last|>", ROWS - 1)
    make_decoder(base if config is TIED else untied_base, tmp_path / "m", fine_tune=tuned)
    own, stored = load_weights(tmp_path / "m"), load_file(tuned / "model.safetensors")
    assert same_bits(own["embed.embedding"], stored[EMBED][:ROWS])
    if config is UNTIED:
        assert same_bits(np.asarray(own["lm_head.kernel"]).T, stored[HEAD][:ROWS])
    assert read_manifest(tmp_path / "m").config.vocab_size == ROWS
    assert "has 24 rows more than the base's, and no token of its own but for" in caplog.text
    export(tmp_path / "m", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == ROWS


def test_the_token_that_pads_batches_is_nobodys(base, tmp_path):
    tuned = fine_tune(tmp_path / "tuned", TIED, ROWS + 1)
    add_token(tuned, "<|last|>", ROWS - 1)
    add_token(tuned, "[PAD]", ROWS)
    with pytest.raises(CheckpointError, match=r"tokens '\[PAD\]' are not the base's; import the"):
        make_decoder(base, tmp_path / "m", fine_tune=tuned)
    path = tuned / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "[PAD]"}))
    make_decoder(base, tmp_path / "m", fine_tune=tuned)
    assert read_manifest(tmp_path / "m").config.vocab_size == ROWS


def test_rows_that_nothing_tells_of_are_refused(base, tmp_path):
    tuned = fine_tune(tmp_path / "tuned", TIED, ROWS + 8)
    (tuned / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json that tells whether tokens were"):
        make_decoder(base, tmp_path / "m", fine_tune=tuned)
    assert not (tmp_path / "m").exists()


def test_fewer_rows_are_refused(base, tmp_path):
    tuned = fine_tune(tmp_path / "tuned", TIED, ROWS - 8)
    with pytest.raises(CheckpointError, match=r"vocab_size is 408, but the base .* has 416"):
        make_decoder(base, tmp_path / "m", fine_tune=tuned)


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_a_base_takes_over_the_tokens_of_a_fine_tune(tmp_path, config):
    source = write_hf_folder(tmp_path / "source", config, random_weights(config))
    add_token(source, "<|last|>", ROWS - 1)
    tuned = fine_tune(tmp_path / "tuned", config, ROWS + 2)
    add_token(tuned, "<|last|>", ROWS - 1)
    add_token(tuned, "<|call|>", ROWS)
    import_model(source, tmp_path / "base", vocabulary_of=tuned)
    stored, theirs = (load_file(f / "model.safetensors") for f in (source, tuned))
    base = load_weights(tmp_path / "base")
    embedding = np.concatenate([stored[EMBED], theirs[EMBED][ROWS:]])
    assert same_bits(base["embed.embedding"], embedding)
    if config is UNTIED:
        head = np.concatenate([stored[HEAD], theirs[HEAD][ROWS:]])
        assert same_bits(np.asarray(base["lm_head.kernel"]).T, head)
    assert Tokenizer.load(tmp_path / "base" / "tokenizer").encode("<|call|>") == [ROWS]
    make_decoder(tmp_path / "base", tmp_path / "m", fine_tune=tuned)
    assert same_bits(load_weights(tmp_path / "m")["embed.embedding"], theirs[EMBED])
    export(tmp_path / "base", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == ROWS + 2


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    source = write_hf_folder(tmp_path / "source", TIED, random_weights(TIED))
    tuned = fine_tune(tmp_path / "tuned", TIED, ROWS + 2)
    path = tuned / "tokenizer.json"
    about = json.loads(path.read_text())
    vocabulary = about["model"]["vocab"]
    vocabulary["t"], vocabulary["h"] = vocabulary["h"], vocabulary["t"]
    path.write_text(json.dumps(about))
    with pytest.raises(
        CheckpointError, match="in the base's tokenizer: it is a tokenizer of anoth"
    ):
        import_model(source, tmp_path / "base", vocabulary_of=tuned)
    with pytest.raises(CheckpointError, match="has the tokens of the base, and no others"):
        import_model(source, tmp_path / "base", vocabulary_of=source)


def test_a_base_shrinks_to_the_rows_of_a_fine_tune(tmp_path):
    """transformers' `resize_token_embeddings(len(tokenizer))` drops rows that no token has."""
    source = write_hf_folder(tmp_path / "source", TIED, random_weights(TIED))
    tuned = fine_tune(tmp_path / "tuned", TIED, 405)
    named = Tokenizer.load(source).vocab_size
    assert named < 405
    import_model(source, tmp_path / "base", vocabulary_of=tuned)
    stored, theirs = (load_file(f / "model.safetensors")[EMBED] for f in (source, tuned))
    embedding = np.concatenate([stored[:named], theirs[named:]])
    assert same_bits(load_weights(tmp_path / "base")["embed.embedding"], embedding)
    make_decoder(tmp_path / "base", tmp_path / "m", fine_tune=tuned)


def adapter(folder: Path, embedding: np.ndarray, tokenizer_of: Path) -> Path:
    """A LoRA on one projection, with an embedding as PEFT saves it after resizing."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(OPTIONS))
    rng = np.random.default_rng(0)
    shapes = {"lora_A": (4, 48), "lora_B": (UNTIED.num_heads * UNTIED.head_dim, 4)}
    tensors = {
        f"{PREFIX}{QUERIES}.{name}.weight": rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file({**tensors, f"{PREFIX}{EMBED}": embedding}, folder / "adapter_model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer_of / name).read_bytes())
    return folder


def test_an_embedding_that_is_the_bases_is_no_change(base, tmp_path):
    """What PEFT saves beside the factors because the model was resized."""
    tuned = fine_tune(tmp_path / "tuned", TIED, ROWS + 8)
    add_token(tuned, "<|last|>", ROWS - 1)
    own = np.asarray(load_weights(base)["embed.embedding"])
    padded = np.concatenate([own, np.ones((8, 48), np.float32)])
    make_decoder(base, tmp_path / "m", lora=adapter(tmp_path / "peft", padded, tuned))
    certificate = read_manifest(tmp_path / "m").certificate
    assert certificate is not None
    assert certificate.kind == "lora"


def test_an_adapter_with_tokens_of_its_own(tmp_path):
    source = write_hf_folder(tmp_path / "source", UNTIED, random_weights(UNTIED))
    add_token(source, "<|last|>", ROWS - 1)
    tuned = fine_tune(tmp_path / "tuned", UNTIED, ROWS + 1)
    add_token(tuned, "<|last|>", ROWS - 1)
    add_token(tuned, "<|call|>", ROWS)
    own = load_file(source / "model.safetensors")[EMBED]
    folder = adapter(tmp_path / "peft", np.concatenate([own, own[:1]]), tuned)
    import_model(source, tmp_path / "plain")
    with pytest.raises(
        CheckpointError, match=r"tokens '<\|call\|>' are not the base's; import the"
    ):
        make_decoder(tmp_path / "plain", tmp_path / "m", lora=folder)
    import_model(source, tmp_path / "base", vocabulary_of=folder)
    make_decoder(tmp_path / "base", tmp_path / "m", lora=folder)
    certificate = read_manifest(tmp_path / "m").certificate
    assert certificate is not None
    assert certificate.kind == "lora"


def test_an_untied_base_takes_fine_tunes_of_either_kind(tmp_path):
    untied = full_base(tmp_path / "base", untie_head=True)
    manifest = read_manifest(untied)
    assert not manifest.config.tie_word_embeddings
    weights = load_weights(untied)
    assert same_bits(np.asarray(weights["lm_head.kernel"]).T, weights["embed.embedding"])
    for name, config in (("tied", TIED), ("untied", UNTIED)):
        tuned = fine_tune(tmp_path / name, config, ROWS)
        make_decoder(untied, tmp_path / f"m {name}", fine_tune=tuned)
        own, stored = load_weights(tmp_path / f"m {name}"), load_file(tuned / "model.safetensors")
        assert same_bits(np.asarray(own["lm_head.kernel"]).T, stored.get(HEAD, stored[EMBED]))


def test_a_fine_tune_with_a_head_of_its_own_is_told_how(base, tmp_path):
    tuned = fine_tune(tmp_path / "tuned", UNTIED, ROWS)
    with pytest.raises(CheckpointError, match="import the base with --untie-head"):
        make_decoder(base, tmp_path / "m", fine_tune=tuned)
