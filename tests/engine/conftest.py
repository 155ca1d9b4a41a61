"""Started engines over models of every kind.

All tests share them, so tests look at differences of counters, and use a `cache_salt` of their own
where it matters that nobody has asked the same before.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine.harness import Client, Models, every_kind, running, serve_config, two_by_two


@pytest.fixture(scope="package")
def models() -> Models:
    return every_kind()


@pytest.fixture(scope="package")
def client(models: Models) -> Iterator[Client]:
    """One prefill engine and one decode engine, four tokens a dispatch."""
    with running(models, serve_config()) as client:
        yield client


@pytest.fixture(scope="package")
def client2x2(models: Models) -> Iterator[Client]:
    """Two prefill engines and two decode engines, one token a dispatch."""
    with running(models, two_by_two()) as client:
        yield client
