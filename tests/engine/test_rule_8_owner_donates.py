"""Rule 8: one thread owns a pool, and its steps update the pool in place."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from pshare_jax.config import DecodeConfig, PrefillConfig
from pshare_jax.engine.orchestrator import Orchestrator
from tests.engine.harness import Client, Models, every_kind, serve_config


def test_rule_8_owner_donates(client: Client) -> None:
    for engine in (*client.engine._prefill, *client.engine._decode):
        pool = engine._pool
        assert engine._thread is not None
        assert pool._owner == engine._thread.ident
        for touch in (
            pool.own,
            pool.disown,
            lambda pool=pool: pool.read(len),
            lambda pool=pool: pool.update(lambda pages: (pages, None)),
        ):
            with pytest.raises(RuntimeError, match="own"):
                touch()


def test_steps_donate_the_pool(client: Client) -> None:
    """Every step leaves the arrays it was given deleted, and the buffers where they were."""
    engines = (client.engine._prefill[0], client.engine._decode[0])
    old = [engine._pool._pages for engine in engines]
    addresses = [[page.unsafe_buffer_pointer() for page in pages] for pages in old]
    client.generate("lora-tail5", list(range(30)), 20, cache_salt="donate")
    for engine, pages, where in zip(engines, old, addresses, strict=True):
        assert all(page.is_deleted() for page in pages)
        assert [page.unsafe_buffer_pointer() for page in engine._pool._pages] == where
    assert threading.get_ident() not in {engine._pool._owner for engine in engines}


class Lowered(Exception):  # noqa: N818
    """Carries what a step would have run."""


@pytest.fixture(scope="module")
def optimised() -> Iterator[None]:
    """This file asks what the real compiler makes of a step."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def compiled(owner: Any, step: str, run: Any) -> Any:
    """The executable of jitted `owner.step` for the arguments with which `run` calls it."""
    jitted = getattr(owner, step)

    def catch(*args: Any) -> None:
        raise Lowered(jitted.lower(*args).compile())

    setattr(owner, step, catch)
    try:
        run()
    except Lowered as found:
        return found.args[0]
    finally:
        setattr(owner, step, jitted)
    raise AssertionError(f"{step} was not called")


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("steps", [1, 4])
def test_no_step_copies_the_pool(steps: int) -> None:
    """The scratch memory of a step is far below one layer's pages, let alone the pool."""
    models: Models = every_kind()
    num_pages = 2000
    config = serve_config(
        prefill=PrefillConfig(chunk_buckets=[16], num_pages=num_pages),
        decode=DecodeConfig(
            batch_buckets=[4],
            max_num_seqs=4,
            replay_buckets=[4],
            num_pages=num_pages,
            steps_per_dispatch=steps,
        ),
    )
    engine = Orchestrator(config, models.base_source, models.sources)
    prefill, decode = engine._prefill[0], engine._decode[0]
    prefill._pool.own()
    decode._pool.own()
    weights = prefill._weights["base"]
    groups = decode._groups
    inputs = next(iter(decode._inputs.warm_up(4)))
    staged = prefill._sender.move(prefill._pool, [0], [0], decode.staging)
    programs = {
        "decode": compiled(
            decode, "_decode", lambda: decode._dispatch(groups["full/full"], inputs)
        ),
        "decode lora": compiled(
            decode, "_decode", lambda: decode._dispatch(groups["lora"], inputs)
        ),
    }
    if steps == 1:
        programs |= {
            "chunk": compiled(
                prefill, "_chunk", lambda: prefill._run_chunk(weights, [], 0, [0] * 16, 0)
            ),
            "copy": compiled(prefill, "_copy", lambda: prefill._copy_page(0, 0)),
            "gather": compiled(
                prefill._sender,
                "_gather",
                lambda: prefill._sender.move(prefill._pool, [0], [0], decode.staging),
            ),
            "scatter": compiled(
                decode._receiver, "_scatter", lambda: decode._receiver.store(decode._pool, staged)
            ),
            "replay": compiled(
                decode, "_replay", lambda: decode._extend(groups["lora"], [], 0, [], 4, -1)
            ),
        }
    layer = np.prod(decode._layout.layer_shape(num_pages)) * 4
    assert layer * 2 == decode._layout.bytes_per_page * num_pages
    for name, program in programs.items():
        memory = program.memory_analysis()
        assert memory.temp_size_in_bytes < layer / 4, name
        if name != "gather":
            assert memory.alias_size_in_bytes >= 2 * layer, name
