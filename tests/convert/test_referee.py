"""`verify` against other libraries: how they are asked, with stand-ins for them.

The real ones are asked by hand; docs/converting.md has what they said.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from pshare_jax.convert import __main__ as cli
from pshare_jax.convert.conversions import import_model
from pshare_jax.convert.referee import Referee, named_referee
from pshare_jax.convert.verify import MESSAGES, TOOL, compare_with, load_model
from pshare_jax.errors import CheckpointError
from pshare_jax.text.tokenizer import Tokenizer
from tests.convert.helpers import model_config, random_weights, write_hf_folder
from tests.convert.test_verify import logits_of

CONFIG = model_config()
PROMPTS = ("hello world", "x")

TORCH = """
float32 = "float32"
class Rows(list):
    pass
def tensor(rows):
    return Rows(rows)
class no_grad:
    __enter__ = __exit__ = lambda *_: None
"""

# Gives what `answers.json` in the model's folder says that it gives.
TRANSFORMERS = """
import json, pathlib, types
import numpy as np

class Array:
    def __init__(self, value):
        self.value = value
    def __getitem__(self, index):
        return Array(self.value[index])
    def float(self):
        return self
    def numpy(self):
        return self.value

class AutoTokenizer:
    eos_token_id = 2
    @classmethod
    def from_pretrained(cls, model, local_files_only):
        self = cls()
        self.about = json.loads((pathlib.Path(model) / "answers.json").read_text())
        return self
    def __call__(self, prompt):
        return {"input_ids": self.about["tokens"][prompt]}
    def apply_chat_template(self, messages, tools, add_generation_prompt, tokenize):
        assert add_generation_prompt and not tokenize
        return self.about["with tools" if tools else "without tools"]

class AutoModelForCausalLM:
    @classmethod
    def from_pretrained(cls, model, dtype, local_files_only):
        if dtype != "float32":
            raise ValueError(dtype)
        self = cls()
        self.about = json.loads((pathlib.Path(model) / "answers.json").read_text())
        self.generation_config = types.SimpleNamespace(eos_token_id=self.about["ends"])
        return self
    def eval(self):
        return self
    def __call__(self, rows):
        logits = self.about["logits"][json.dumps(rows[0])]
        return types.SimpleNamespace(logits=Array(np.asarray([logits], np.float32)))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint, its folder, and what a faithful library would say of it."""
    root = tmp_path_factory.mktemp("referee")
    write_hf_folder(root / "hf", CONFIG, random_weights(CONFIG))
    import_model(root / "hf", root / "base")
    opened = load_model(root / "base")
    tokenizer = Tokenizer.load(root / "base" / "tokenizer")
    tokens = {p: tokenizer.encode(p) for p in PROMPTS}
    answers = {
        "tokens": tokens,
        "with tools": tokenizer.apply_chat_template(MESSAGES, [TOOL]),
        "without tools": tokenizer.apply_chat_template(MESSAGES),
        "ends": list(tokenizer.eos_token_ids),
        "logits": {json.dumps(t): logits_of(opened, t).tolist() for t in tokens.values()},
    }
    return root, opened, answers


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    """A folder that the interpreter takes modules from before any other."""
    folder = tmp_path / "libraries"
    folder.mkdir()
    (folder / "torch.py").write_text(TORCH)
    (folder / "transformers.py").write_text(TRANSFORMERS)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def said(root: Path, answers: dict, **changes) -> Referee:
    (root / "hf" / "answers.json").write_text(json.dumps({**answers, **changes}))
    referee = named_referee(f"transformers:{root / 'hf'}", None)
    assert referee is not None
    return referee


def test_a_faithful_reading_is_no_difference(model, libraries):
    root, opened, answers = model
    difference, library = compare_with(opened, said(root, answers), PROMPTS)
    assert difference.largest < 1e-5
    assert difference.positions == difference.same_best == sum(map(len, answers["tokens"].values()))
    assert difference.others == ()
    assert library.startswith("transformers ")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"tokens": {p: [0, 1] for p in PROMPTS}}, "the tokens of 'hello world' are "),
        ({"with tools": "x"}, "the chat template gives another text with tools"),
        ({"without tools": None}, "the chat template gives another text without tools"),
        ({"ends": 7}, "the end tokens are (2, 0) and (7,)"),
    ],
)
def test_what_a_library_reads_otherwise_is_found(model, libraries, changes, found):
    root, opened, answers = model
    difference, _ = compare_with(opened, said(root, answers, **changes), PROMPTS)
    (line,) = difference.others
    assert line.startswith(found)


def test_other_logits_are_found_and_end_with_1(model, libraries, tmp_path, capsys):
    root, _, answers = model
    logits = {key: (2 * np.asarray(rows)).tolist() for key, rows in answers["logits"].items()}
    said(root, answers, logits=logits)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    arguments = [str(root / "base"), f"transformers:{root / 'hf'}"]
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--python", sys.executable]
    assert cli.main(["verify", *arguments, *options]) == 1
    out = capsys.readouterr().out
    assert "compared with transformers " in out
    assert "above the tolerance 0.001" in out
    assert cli.main(["verify", *arguments, *options, "--tolerance", "100"]) == 0


def test_another_vocabulary_is_refused(model, libraries):
    root, opened, answers = model
    logits = {key: [row[:-1] for row in rows] for key, rows in answers["logits"].items()}
    with pytest.raises(CheckpointError, match="vocabularies of 416 and 415 tokens"):
        compare_with(opened, said(root, answers, logits=logits), PROMPTS)


def test_a_missing_library_is_named(model, libraries):
    root, opened, answers = model
    (libraries / "torch.py").write_text("raise ModuleNotFoundError('No module named torch')")
    with pytest.raises(CheckpointError, match="No module named torch; comparing with transformers"):
        compare_with(opened, said(root, answers), PROMPTS)


def test_a_library_that_fails_is_quoted(model, libraries):
    root, opened, answers = model
    message = "transformers ended with 1: KeyError: 'x'"
    with pytest.raises(CheckpointError, match=message):
        compare_with(opened, said(root, answers, tokens={}), ("x",))


def test_an_interpreter_that_is_none_is_named(model):
    root, opened, answers = model
    said(root, answers)
    referee = named_referee(f"transformers:{root / 'hf'}", "/none/python")
    assert referee is not None
    with pytest.raises(CheckpointError, match="/none/python: cannot be run: No such file"):
        compare_with(opened, referee, PROMPTS)


@pytest.mark.parametrize("text", ["transformers:/none", "llama.cpp:/none.gguf", "llama.cpp:/tmp"])
def test_what_is_not_there_is_refused_before_anything_is_read(text):
    with pytest.raises(CheckpointError, match=f"for {text.partition(':')[0]} to read"):
        named_referee(text, None)


def test_other_sources_are_no_referees():
    for text in ("checkpoints/base", "pypi:name==1", "org/name", "C:model"):
        assert named_referee(text, None) is None
