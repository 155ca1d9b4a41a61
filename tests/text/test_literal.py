"""Special tokens that a text spells out, beside those that are meant."""

import re

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models

from pshare_jax.text.literal import LiteralEncoder
from pshare_jax.text.tokenizer import Tokenizer
from tests.text.tiny import write_byte_level, write_metaspace, write_sentencepiece


@pytest.fixture(
    scope="module",
    params=[write_byte_level, write_sentencepiece, write_metaspace],
    ids=["byte level", "leading space", "leading space of the first"],
)
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(request.param(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def token(tokenizer) -> str:
    return tokenizer.token_string(2)


def marked(tokenizer: Tokenizer, text: str) -> str:
    return tokenizer.literal.mark(text, tokenizer.special_pattern)


@pytest.mark.parametrize("around", [False, True])
def test_marks_are_encoded_as_the_tokens_themselves(tokenizer, token, around):
    for text in ("hi", f"{token}hi", f"hi{token}", f"hi {token} hi{token}{token} hi", ""):
        found = tokenizer.literal.encode(marked(tokenizer, text), around)
        assert found == tokenizer.encode(text, around)


def test_what_is_spelled_out_is_the_text_that_was_sent(tokenizer, token):
    for text in (f"hi{token}hi", f"hi {token} hi", f"{token}", f"{token} hi"):
        ids = tokenizer.literal.encode(text, False)
        assert not tokenizer.special_ids.intersection(ids)
        assert tokenizer.decode(ids) == text


def test_both_in_one_text(tokenizer, token):
    """The template's own tokens are tokens, those of a message are letters, in its place."""
    ids = tokenizer.literal.encode(f"{marked(tokenizer, token)}hi{token}hi", False)
    assert [i for i in ids if i in tokenizer.special_ids] == [2]
    assert ids[0] == 2
    assert tokenizer.decode(ids).strip() == f"hi{token}hi"


def test_the_tokenizer_itself_stays_as_it_is(tokenizer, token):
    before = tokenizer.vocab_size, tokenizer.encode(f"hi{token}", False)
    LiteralEncoder(tokenizer._fast)
    assert (tokenizer.vocab_size, tokenizer.encode(f"hi{token}", False)) == before


def test_marks_do_not_take_ids_of_a_vocabulary_with_gaps():
    words = {**{word: i for i, word in enumerate("abcdefghijkl")}, "z": 14}
    fast = FastTokenizer(models.BPE({**words, "<s>": 12}, []))
    fast.add_special_tokens(["<s>"])
    literal = LiteralEncoder(fast)
    assert literal.encode("abz", False) == fast.encode("abz").ids == [0, 1, 14]
    assert literal.encode(literal.mark("a<s>z", re.compile("<s>")), False) == [0, 12, 14]
