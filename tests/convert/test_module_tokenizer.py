"""A decode module's own chat template and end tokens: kept, sealed, and used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pshare_jax.config import ModelEntry
from pshare_jax.convert.conversions import export, import_model, make_decoder
from pshare_jax.convert.manifest import TOKENIZER_FOLDER
from pshare_jax.convert.seals import open_checkpoint
from pshare_jax.engine.sources import BaseSource, model_source
from pshare_jax.errors import CheckpointError
from pshare_jax.text.tokenizer import Tokenizer
from tests.convert.helpers import model_config, random_weights, write_hf_folder
from tests.convert.test_decoder import factors_for, write_peft

CONFIG = model_config()
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
MESSAGES = [{"role": "user", "content": "hi"}]


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def folders(tmp_path):
    """A base, and a fine-tune of it that is not converted yet."""
    write_hf_folder(tmp_path / "hf", CONFIG, random_weights(CONFIG))
    import_model(tmp_path / "hf", tmp_path / "base")
    write_hf_folder(tmp_path / "tuned", CONFIG, random_weights(CONFIG, seed=1))
    return tmp_path


def tokenizer_of(folders: Path) -> Tokenizer:
    base = open_checkpoint(folders / "base")
    source = BaseSource(base.config, base.fingerprint, lambda _: {})
    entry = ModelEntry("m", str(folders / "m"), sharing="isolated")
    folder = model_source(entry, source, "float32").tokenizer_folder
    return Tokenizer.load(folders / "base" / TOKENIZER_FOLDER).of_module(folder)


def test_a_template_and_an_end_of_its_own(folders):
    base = Tokenizer.load(folders / "base" / TOKENIZER_FOLDER)
    (folders / "tuned" / "chat_template.jinja").write_text(TEMPLATE)
    further = folders / "tuned" / "additional_chat_templates"
    further.mkdir()
    (further / "tool_use.jinja").write_text("with tools: " + TEMPLATE)
    (folders / "tuned" / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    make_decoder(folders / "base", folders / "m", fine_tune=folders / "tuned")
    own = tokenizer_of(folders)
    assert own.eos_token_ids == (7, 9, *base.eos_token_ids)
    assert own.apply_chat_template(MESSAGES) == "[user] hi\n"
    assert own.apply_chat_template(MESSAGES, tools=[{"a": 1}]) == "with tools: [user] hi\n"
    assert own.encode("hello") == base.encode("hello")
    assert base.apply_chat_template(MESSAGES) != "[user] hi\n"
    assert base.eos_token_ids == Tokenizer.load(folders / "base" / TOKENIZER_FOLDER).eos_token_ids
    path = folders / "m" / TOKENIZER_FOLDER / "chat_template.jinja"
    path.write_text("another")
    with pytest.raises(
        CheckpointError, match=r"chat_template\.jinja: changed since the conversion"
    ):
        open_checkpoint(folders / "m")


def test_what_is_the_bases_is_not_kept(folders):
    make_decoder(folders / "base", folders / "m", fine_tune=folders / "tuned")
    assert not (folders / "m" / TOKENIZER_FOLDER).exists()
    base = Tokenizer.load(folders / "base" / TOKENIZER_FOLDER)
    assert tokenizer_of(folders).eos_token_ids == base.eos_token_ids
    assert base.of_module(None) is base


def test_an_adapter_has_them_too(folders):
    peft = write_peft(folders / "peft", factors_for("q"))
    end = Tokenizer.load(folders / "base" / TOKENIZER_FOLDER).token_string(5)
    (peft / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": TEMPLATE, "eos_token": end})
    )
    make_decoder(folders / "base", folders / "m", lora=peft)
    own = tokenizer_of(folders)
    assert own.eos_token_ids[0] == 5
    assert own.apply_chat_template(MESSAGES) == "[user] hi\n"


@pytest.mark.parametrize("where", ["template", "end"])
def test_a_control_token_that_the_base_lacks_is_named(folders, where):
    path = folders / "tuned" / "tokenizer.json"
    added = json.loads(path.read_text())["added_tokens"]
    token = {**added[-1], "id": 410, "content": "<|turn|>"}
    edit(path, added_tokens=[*added, token])
    if where == "template":
        (folders / "tuned" / "chat_template.jinja").write_text("<|turn|>" + TEMPLATE)
    else:
        (folders / "tuned" / "generation_config.json").write_text('{"eos_token_id": 410}')
    with pytest.raises(
        CheckpointError, match=r"token '<\|turn\|>' is 410, .* but None in the base"
    ):
        make_decoder(folders / "base", folders / "m", fine_tune=folders / "tuned")
    assert not (folders / "m").exists()


def test_an_unused_token_of_its_own_does_not_matter(folders):
    path = folders / "tuned" / "tokenizer.json"
    added = json.loads(path.read_text())["added_tokens"]
    edit(path, added_tokens=[*added, {**added[-1], "id": 410, "content": "<|turn|>"}])
    make_decoder(folders / "base", folders / "m", fine_tune=folders / "tuned")
    assert not (folders / "m" / TOKENIZER_FOLDER).exists()


def test_an_end_that_is_no_id_is_named(folders):
    (folders / "tuned" / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id is no id"):
        make_decoder(folders / "base", folders / "m", fine_tune=folders / "tuned")


def test_an_export_has_them_and_comes_back_with_them(folders):
    (folders / "tuned" / "chat_template.jinja").write_text(TEMPLATE)
    (folders / "tuned" / "generation_config.json").write_text('{"eos_token_id": 7}')
    make_decoder(folders / "base", folders / "m", fine_tune=folders / "tuned")
    first = tokenizer_of(folders)
    export(folders / "m", folders / "out", base=folders / "base")
    assert (folders / "out" / "chat_template.jinja").read_text() == TEMPLATE
    (folders / "m").rename(folders / "before")
    make_decoder(folders / "base", folders / "m", fine_tune=folders / "out")
    again = tokenizer_of(folders)
    assert again.eos_token_ids == first.eos_token_ids
    assert again.chat_templates == first.chat_templates == {"default": TEMPLATE}


def test_the_last_message_is_by_the_bases_template(folders):
    (folders / "tuned" / "chat_template.jinja").write_text(TEMPLATE)
    with pytest.raises(CheckpointError, match="the tail last-message goes by the base's"):
        make_decoder(
            folders / "base",
            folders / "m",
            fine_tune=folders / "tuned",
            tail="last-message",
            cache_conditioned=True,
        )
