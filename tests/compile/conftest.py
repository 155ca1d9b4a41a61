"""Lets the accelerators' compilers start on this machine."""

import pytest

from pshare_jax.bench.accelerators import prepare


@pytest.fixture(scope="session", autouse=True)
def compilers():
    prepare()
