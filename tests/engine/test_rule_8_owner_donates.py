"""Rule 8: one thread owns a pool, and its steps update the pool in place."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import pytest

from pshare_jax.config import DecodeConfig, PrefillConfig
from pshare_jax.engine.orchestrator import Orchestrator
from pshare_jax.runtime.executor import DecodeExecutor, GroupWeights, PrefillExecutor
from pshare_jax.runtime.programs import Call, Slot
from tests.engine.harness import Client, Models, every_kind, serve_config


def test_rule_8_owner_donates(client: Client) -> None:
    for worker in (*client.engine.workers.prefill, *client.engine.workers.decode):
        pool = worker.executor.pool
        thread = client.engine._thread_of[worker.name]._thread
        assert thread is not None
        assert pool._owner == thread.ident
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
    workers = client.engine.workers
    pools = [worker.executor.pool for worker in (*workers.prefill, *workers.decode)]
    old = [pool._pages for pool in pools]
    addresses = [[page.unsafe_buffer_pointer() for page in pages] for pages in old]
    client.generate("lora-tail5", list(range(30)), 20, cache_salt="donate")
    for pool, pages, where in zip(pools, old, addresses, strict=True):
        assert all(page.is_deleted() for page in pages)
        assert [page.unsafe_buffer_pointer() for page in pool._pages] == where
    assert threading.get_ident() not in {pool._owner for pool in pools}


def compiled(call: Call, given: dict[Slot, Any]) -> Any:
    """The executable of a program for the arguments that serving calls it with."""
    arguments = [given[a] if isinstance(a, Slot) else a for a in call.arguments]
    return call.function.lower(*arguments).compile()


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
    prefill, decode = engine.workers.prefill[0].executor, engine.workers.decode[0].executor
    layout = prefill.programs.layout
    layer = np.prod(layout.layer_shape(num_pages)) * 4
    assert layer * 2 == layout.bytes_per_page * num_pages

    def given(executor: PrefillExecutor | DecodeExecutor, group: GroupWeights) -> dict[Slot, Any]:
        staged = np.zeros(executor.programs.staged_shape(1), np.float32)
        return {
            Slot.WEIGHTS: group.weights,
            Slot.ADAPTERS: group.adapters,
            Slot.POOL: executor.pool._pages,
            Slot.HISTORY: decode._history,
            Slot.STAGED: jax.device_put(staged, executor.programs.staging),
            Slot.LEFT: np.zeros((4, models.config.vocab_size), np.float32),
        }

    def one_of_each(calls: Iterable[Call]) -> list[Call]:
        return list({call.name: call for call in reversed(list(calls))}.values())

    cases = [
        (call, given(decode, decode._groups[group]))
        for group in ("full/full", "base")
        for call in one_of_each(decode.programs.decode_calls())
        if steps == 1 or call.name == "decode"
    ]
    if steps == 1:
        base = GroupWeights(prefill.weights["base"])
        cases += [
            (call, given(prefill, base))
            for call in one_of_each(
                [*prefill.programs.prefill_calls(), *prefill.programs.sending_calls()]
            )
        ]
        cases += [
            (call, given(decode, base)) for call in one_of_each(decode.programs.receiving_calls())
        ]
    for call, arguments in cases:
        memory = compiled(call, arguments).memory_analysis()
        assert memory.temp_size_in_bytes < layer / 4, call.name
        if Slot.POOL in call.results:
            assert memory.alias_size_in_bytes >= 2 * layer, call.name
    names = {call.name for call, _ in cases}
    expected = {"chunk", "copy", "gather", "checksum", "scatter", "replay", "decode", "admit"}
    expected.add("choose")
    assert names == (expected if steps == 1 else {"decode"})
