from collections.abc import Iterator

import pytest

from pshare_jax.text.tokenizer import Tokenizer
from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import Client, running_server
from tests.text.tiny import write_byte_level


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    return write_byte_level(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture
def client(tokenizer) -> Iterator[Client]:
    """A server that answers "hello world" to everything."""
    with running_server(fake_engine(tokenizer)) as client:
        yield client


@pytest.fixture
def impatient(tokenizer) -> Iterator[Client]:
    """A server with short timeouts for slow clients."""
    config = fake_config(max_model_len=100_000, read_timeout_seconds=0.3, write_timeout_seconds=0.3)
    with running_server(fake_engine(tokenizer, config)) as client:
        yield client
