import pytest

from pshare_jax.text.tokenizer import Tokenizer
from tests.text.tiny import write_byte_level, write_sentencepiece


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(write_byte_level(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(write_sentencepiece(tmp_path_factory.mktemp("sentencepiece")))
