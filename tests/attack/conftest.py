from collections.abc import Iterator

import pytest

from tests.serve.conftest import tokenizer, tokenizer_folder  # noqa: F401 (fixtures)
from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import Client, running_server


@pytest.fixture(scope="module")
def victim(tokenizer) -> Iterator[Client]:  # noqa: F811
    """A server that is attacked, and must be as it was afterwards."""
    config = fake_config(max_body_bytes=200_000, read_timeout_seconds=5.0, access_log="json")
    with running_server(fake_engine(tokenizer, config)) as client:
        yield client
        assert client.engine.running_ids == []
        assert client.engine.dead is None
        assert client.complete().json["choices"][0]["text"] == "hello world"
