from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from pshare_jax.runtime.layout import PageLayout
from pshare_jax.runtime.pool import PagePool
from tests.helpers import tiny_config


@pytest.fixture
def pool() -> PagePool:
    layout = PageLayout.of(tiny_config(), 8, jnp.float32)
    return PagePool(layout, 5, SingleDeviceSharding(jax.devices()[0]))


def test_layout() -> None:
    layout = PageLayout.of(tiny_config(), 8, jnp.bfloat16)
    assert layout.layer_shape(5) == (5, 2, 2, 8, 16)
    assert layout.bytes_per_token == 2 * 2 * 2 * 16 * 2
    assert layout.bytes_per_page == 8 * layout.bytes_per_token
    assert [layout.pages_for(n) for n in (0, 1, 8, 9)] == [0, 1, 1, 2]


def test_pages_are_zero_and_of_the_right_shape(pool: PagePool) -> None:
    pool.own()
    assert (
        pool.read(lambda pages: [(p.shape, p.dtype) for p in pages])
        == [((5, 2, 2, 8, 16), jnp.float32)] * 2
    )
    assert not pool.read(lambda pages: bool(jnp.any(pages[0] != 0)))


def test_update_replaces_the_pages(pool: PagePool) -> None:
    pool.own()
    assert pool.update(lambda pages: (tuple(p + 1 for p in pages), "result")) == "result"
    assert pool.read(lambda pages: float(pages[1].min())) == 1


def test_only_the_owner_may_touch_it(pool: PagePool) -> None:
    with pytest.raises(RuntimeError, match="own"):
        pool.read(len)
    pool.own()
    pool.own()
    errors: list[BaseException] = []

    def stranger() -> None:
        for touch in (pool.own, lambda: pool.read(len), pool.disown):
            try:
                touch()
            except RuntimeError as error:
                errors.append(error)

    thread = threading.Thread(target=stranger)
    thread.start()
    thread.join()
    assert len(errors) == 3
    pool.disown()
    errors.clear()
    thread = threading.Thread(target=stranger)
    thread.start()
    thread.join()
    assert errors == [], "it was given up, so another thread may have it"
