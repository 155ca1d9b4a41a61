"""Tokenizers built from GGUF metadata."""

from __future__ import annotations

import itertools
import json
import unicodedata

import gguf
import numpy as np
import pytest

from pshare_jax.convert.gguf import GGUFFile
from pshare_jax.convert.gguf_tokenizer import PRE_TOKENIZERS, SPACE, tokenizer_files
from pshare_jax.errors import CheckpointError
from pshare_jax.text.tokenizer import Tokenizer
from tests.convert.helpers import add_gguf_config, add_gguf_tokenizer, gguf_config
from tests.text.tiny import CHAT_TEMPLATE, write_byte_level

TEXTS = (
    "",
    " ",
    "hello world",
    "  two  spaces and a tab\t.\n\nnew\r\nlines  ",
    "don't I'LL you've",
    "2024 costs 31415.9265€",
    "naïve café Straße e\u0301 ﬁ",
    "你好，世界 日本語 🙂👩‍👩‍👧 \u200b\ufeff",
    "x = {'a': [1, 2], \"b\": None}  # done",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a\x00b\x7f",
)


def make_file(path, pre="gpt-2", edit=lambda writer: None, tokenizer=add_gguf_tokenizer):
    """A GGUF file with metadata and one tensor: all that a tokenizer needs."""
    writer = gguf.GGUFWriter(path, "llama")
    add_gguf_config(writer, gguf_config())
    tokenizer(writer, write_byte_level(path.parent / "source"), pre)
    edit(writer)
    writer.add_tensor("token_embd.weight", np.zeros((416, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path)


def load(file: GGUFFile, folder) -> Tokenizer:
    """The tokenizer of `file`, by way of the files that a checkpoint has."""
    folder.mkdir()
    for name, data in tokenizer_files(file).items():
        (folder / name).write_bytes(data)
    return Tokenizer.load(folder)


def test_the_tokenizer_is_the_one_that_was_put_in(tmp_path):
    ours = load(make_file(tmp_path / "m.gguf"), tmp_path / "ours")
    theirs = Tokenizer.load(write_byte_level(tmp_path / "theirs"))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text
    assert ours.vocab_size == theirs.vocab_size
    assert ours.special_ids == theirs.special_ids
    assert ours.eos_token_ids == theirs.eos_token_ids == (2, 0)
    messages = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_text_comes_back(tmp_path, pre):
    tokenizer = load(make_file(tmp_path / "m.gguf", pre), tmp_path / "ours")
    for text in TEXTS:
        expected = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == expected


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["I", "'m", " 1234567", "!!", "\n", "\n", "DON", "'", "T", "  ", " x"]),
        ("smollm", ["I", "'m", " ", *"1234567", "!!", "\n", "\n", "DON", "'", "T", "  ", " x"]),
        ("llama-bpe", ["I", "'m", " ", "123", "456", "7", "!!\n\n", "DON", "'T", "  ", " x"]),
        ("qwen2", ["I", "'m", " ", *"1234567", "!!\n\n", "DON", "'T", "  ", " x"]),
        ("refact", ["I", "'m", " ", *"1234567", "!!", "\n", "\n", "DON", "'", "T", "  ", " x"]),
        ("dbrx", ["I", "'m", " ", "123", "456", "7", "!!\n\n", "DON", "'T", "  ", " x"]),
        ("tekken", ["I", "'m", " ", *"1234567", "!!\n\n", "DON", "'T", "  ", " x"]),
        ("gpt-4o", ["I'm", " ", "123", "456", "7", "!!\n\n", "DON'T", "  ", " x"]),
    ],
)
def test_text_is_cut_as_the_family_cuts_it(pre, pieces):
    text = "I'm 1234567!!\n\nDON'T   x"
    cut = PRE_TOKENIZERS[pre].build().pre_tokenize_str(text)
    assert [text[start:stop] for _, (start, stop) in cut] == pieces


def test_tekken_and_gpt_4o_cut_where_capitals_begin():
    text = "getHTTPResponse/a 42"
    cut = PRE_TOKENIZERS["tekken"].build().pre_tokenize_str(text)
    assert [text[a:b] for _, (a, b) in cut] == ["get", "HTTPResponse", "/a", " ", "4", "2"]
    cut = PRE_TOKENIZERS["gpt-4o"].build().pre_tokenize_str(text)
    assert [text[a:b] for _, (a, b) in cut] == ["get", "HTTPResponse", "/a", " ", "42"]


@pytest.mark.parametrize(
    ("pre", "flag", "expected"),
    [
        ("gpt-2", None, []),
        ("gpt-2", True, [0]),
        ("llama-bpe", None, [0]),
        ("llama-bpe", False, []),
    ],
)
def test_bos_is_added_when_the_file_says_so(tmp_path, pre, flag, expected):
    def edit(writer):
        if flag is not None:
            writer.add_add_bos_token(flag)

    tokenizer = load(make_file(tmp_path / "m.gguf", pre, edit), tmp_path / "ours")
    plain = tokenizer.encode("hi there", add_special_tokens=False)
    assert tokenizer.encode("hi there") == expected + plain


def test_eos_is_added_when_the_file_says_so(tmp_path):
    file = make_file(tmp_path / "m.gguf", edit=lambda w: w.add_add_eos_token(True))
    tokenizer = load(file, tmp_path / "ours")
    assert tokenizer.encode("hi")[-1] == 2


def test_llama_bpe_keeps_whole_tokens(tmp_path):
    """Without `ignore_merges` a token that no merges lead to would be cut."""

    def edit(writer):
        writer.kv_data[0]["tokenizer.ggml.tokens"].value.append("zqzq")
        writer.kv_data[0]["tokenizer.ggml.token_type"].value.append(gguf.TokenType.NORMAL)

    for pre, whole in (("llama-bpe", True), ("qwen2", False)):
        tokenizer = load(make_file(tmp_path / f"{pre}.gguf", pre, edit), tmp_path / pre)
        ids = tokenizer.encode("zqzq", add_special_tokens=False)
        assert (len(ids) == 1) == whole
        assert tokenizer.decode(ids) == "zqzq"


def test_end_tokens_are_the_declared_and_the_well_known(tmp_path):
    def edit(writer):
        writer.add_eot_token_id(1)

    files = tokenizer_files(make_file(tmp_path / "m.gguf", edit=edit))
    assert json.loads(files["generation_config.json"]) == {"eos_token_id": [2, 1, 0]}
    about = json.loads(files["tokenizer_config.json"])
    assert about["eos_token"] == "<|im_end|>"
    assert about["bos_token"] == "<|endoftext|>"
    assert about["chat_template"] == CHAT_TEMPLATE


def test_a_file_without_a_chat_template(tmp_path):
    file = make_file(
        tmp_path / "m.gguf", edit=lambda w: w.kv_data[0].pop("tokenizer.chat_template")
    )
    assert "chat_template" not in json.loads(tokenizer_files(file)["tokenizer_config.json"])


# SentencePiece

WORDS = ["\u2581he", "llo", "ll", "lo", "\u2581h", "\u2581", "h", "e", "l", "o", "he", "\u2581lo"]
SCORES = [-1.0, -2.0, -3.5, -3.0, -4.0, *[-10.0] * 5, -2.5, -0.5]


def add_sentencepiece(writer, folder=None, pre=None):
    """A toy vocabulary; scores decide what is joined first."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2]
    kinds += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * len(WORDS)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + SCORES)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def sentencepiece_pieces(text: str) -> list[str]:
    """SentencePiece's BPE: join the best-scoring neighbours, leftmost first, as long as any can."""
    score = dict(zip(WORDS, SCORES, strict=True))
    pieces = list((" " + text).replace(" ", SPACE))
    while True:
        joints = [
            (-score[a + b], i)
            for i, (a, b) in enumerate(itertools.pairwise(pieces))
            if a + b in score
        ]
        if not joints:
            return pieces
        _, i = min(joints)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


@pytest.mark.parametrize("text", ["hello", "he llo", "lo", " hello  lo", "hehello ello lolo"])
def test_sentencepiece_joins_by_score(tmp_path, text):
    file = make_file(tmp_path / "m.gguf", tokenizer=add_sentencepiece)
    tokenizer = load(file, tmp_path / "ours")
    ids = tokenizer.encode(text)
    assert ids[0] == 1
    assert [tokenizer.token_string(i) for i in ids[1:]] == sentencepiece_pieces(text)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_text_comes_back(tmp_path, prefix):
    file = make_file(
        tmp_path / "m.gguf",
        tokenizer=add_sentencepiece,
        edit=lambda w: w.add_add_space_prefix(prefix),
    )
    tokenizer = load(file, tmp_path / "ours")
    for text in TEXTS:
        if text and "<|" not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text
    first = tokenizer.token_string(tokenizer.encode("hello")[1])
    assert first == ("\u2581he" if prefix else "he")
    assert tokenizer.eos_token_ids == (2,)


# Refusals


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda kv: kv["tokenizer.ggml.pre"].__setattr__("value", "viking"),
            r"tokenizer\.ggml\.pre 'viking' is not supported; supported are default, gpt-2, ",
        ),
        (
            lambda kv: kv["tokenizer.ggml.model"].__setattr__("value", "bert"),
            r"tokenizer\.ggml\.model 'bert' is not supported",
        ),
        (
            lambda kv: kv["tokenizer.ggml.eos_token_id"].__setattr__("value", 9999),
            r"tokenizer\.ggml\.eos_token_id is 9999: no such token",
        ),
        (
            lambda kv: kv["tokenizer.ggml.token_type"].value.pop(),
            r"token_type has \d+ entries for \d+ tokens",
        ),
        (
            lambda kv: kv["tokenizer.ggml.merges"].value.append("zz qq"),
            "tokenizer is malformed",
        ),
        (
            lambda kv: kv["tokenizer.ggml.tokens"].value.extend(str(i) for i in range(999)),
            r"has \d+ tokens, but tensor token_embd\.weight only 416 rows",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_built_is_explained(tmp_path, edit, message):
    file = make_file(tmp_path / "m.gguf", edit=lambda writer: edit(writer.kv_data[0]))
    with pytest.raises(CheckpointError, match=message) as raised:
        tokenizer_files(file)
    assert str(tmp_path / "m.gguf") in str(raised.value)


def test_a_bos_that_is_not_declared(tmp_path):
    def edit(writer):
        writer.kv_data[0].pop("tokenizer.ggml.bos_token_id")
        writer.add_add_bos_token(True)

    with pytest.raises(CheckpointError, match="adds a bos_token, but declares none"):
        tokenizer_files(make_file(tmp_path / "m.gguf", edit=edit))
