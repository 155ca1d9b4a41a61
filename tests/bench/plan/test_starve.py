"""A request of 2 tokens beside floods, in virtual time: the cores, hosts and turns of a server."""

import pytest

from pshare_jax.bench.plan.costs import Line, TableCosts
from pshare_jax.bench.plan.specs import EngineSpec, ServerSpec, SystemSpec
from pshare_jax.bench.plan.system import System
from pshare_jax.config import DecodeConfig
from pshare_jax.core.requests import Owner

CHUNK, STEP = 0.25, 0.03
COSTS = TableCosts(
    {32: Line(0.03, 0.0), 128: Line(0.07, 0.0), 512: Line(CHUNK, 0.0)},
    {1: Line(0.008, 0.0), 8: Line(0.014, 0.0), 32: Line(STEP, 0.0)},
)
HOT, OTHER = 0, 1


def server() -> System:
    """One processor that takes turns, with pools of four prompts of full length each."""
    spec = ServerSpec(
        models=range(2),
        shared=True,
        one_group=True,
        page_size=64,
        chunk_buckets=[32, 128, 512],
        settings=DecodeConfig(max_num_seqs=32, batch_buckets=[1, 8, 32], replay_buckets=[32]),
        prefill=[EngineSpec(COSTS, 129, 0)],
        decode=[EngineSpec(COSTS, 129, 0)],
    )
    return System(SystemSpec([spec]))


# Sequences, tokens of a prompt, whether prompts differ, and whether all are one request.
FLOODS = {
    "32 prompts of 1,900 tokens": (32, 1900, True, False),
    "n = 128": (128, 64, False, True),
    "one request of 250 prompts": (250, 64, True, True),
    "64 requests to one model": (64, 64, True, False),
}


def seconds_of_a_small_request(flood: str | None, when: float) -> float:
    system, times = server(), []
    count, length, differ, together = FLOODS[flood] if flood else (0, 0, False, False)
    for i in range(count):
        owner = Owner(request="flood" if together else "")
        system.submit(i if differ else 0, HOT, length, 128, lambda: None, owner)

    def ask() -> None:
        model = OTHER if flood == "64 requests to one model" else HOT
        call = system.submit(10_000, model, 2, 2, lambda: times.append(call.arrivals[-1] - when))

    system.clock.at(when, ask)
    system.clock.run()
    return times[0]


@pytest.mark.parametrize("when", [2.0, 5.0])
@pytest.mark.parametrize("flood", FLOODS)
def test_a_small_request_waits_for_two_chunks_beside_what_it_needs(flood: str, when: float):
    """Two for its prefill, one that is computed meanwhile, and steps as the flood's are.

    Oldest first, it took 44, 14, 42 and 9 seconds.
    """
    alone = seconds_of_a_small_request(None, when)
    assert alone < 0.1
    assert seconds_of_a_small_request(flood, when) <= alone + 3 * CHUNK + 3 * STEP
