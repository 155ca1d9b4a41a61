"""The simulation against closed forms, and what it must keep whatever it simulates."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pshare_jax.bench.agents_load import Load
from pshare_jax.bench.agents_workload import Workload
from pshare_jax.bench.limits import g_max, isolated_prefill_tokens, rho, shared_prefill_tokens
from pshare_jax.bench.plan.bounds import bound, decode_seconds, prefill_seconds
from pshare_jax.bench.plan.costs import Line, TableCosts
from pshare_jax.bench.plan.play import SimPlayer, simulate
from pshare_jax.bench.plan.specs import EngineSpec, ServerSpec, SystemSpec
from pshare_jax.bench.plan.system import System
from pshare_jax.config import DecodeConfig

CHUNKS, BATCHES = [32, 128], [1, 4, 16]
COSTS = TableCosts(
    {32: Line(0.004, 1e-5), 128: Line(0.01, 1e-5)},
    {1: Line(0.002, 1e-6), 4: Line(0.003, 1e-6), 16: Line(0.005, 1e-6)},
)
REACT = Workload("react", models=4, turns=2, prompt=100, generated=6, observed=10)


def spec(
    *,
    shared: bool = True,
    pages: tuple[int, int] = (400, 400),
    engines: tuple[int, int] = (1, 1),
    one_processor: bool = False,
    one_group: bool = False,
    costs=COSTS,
    call_seconds: float = 0.0,
    models: int = 4,
    reply_ahead: bool = False,
) -> SystemSpec:
    numbers = itertools.count()

    def side(count: int, size: int) -> list[EngineSpec]:
        return [
            EngineSpec(costs, size, 0 if one_processor else next(numbers)) for _ in range(count)
        ]

    server = ServerSpec(
        models=range(models),
        shared=shared,
        one_group=one_group,
        page_size=16,
        chunk_buckets=CHUNKS,
        settings=DecodeConfig(max_num_seqs=16, batch_buckets=BATCHES, replay_buckets=[32]),
        prefill=side(engines[0], pages[0]),
        decode=side(engines[1], pages[1]),
        reply_ahead=reply_ahead,
    )
    return SystemSpec([server], call_seconds)


def run(system: SystemSpec, workload: Workload = REACT, sessions: int = 1, live: int = 1) -> dict:
    return simulate(system, workload, Load(sessions, live, 0.0, 0))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("one_processor", [True, False])
def test_one_session_takes_the_sum_of_its_costs(shared, one_processor):
    alone = run(spec(shared=shared, one_processor=one_processor, call_seconds=0.5))
    expected = prefill_seconds(COSTS, REACT, CHUNKS, 16, shared)
    expected += decode_seconds(COSTS, REACT, BATCHES, 1)
    # The closed form takes the mean context of a call's tokens; steps are linear in it.
    assert alone["seconds"] == pytest.approx(expected + 8 * 0.5, rel=1e-9)
    assert alone["engines"]["sequences_per_step"] == 1


def test_a_call_by_hand():
    workload = Workload("react", models=1, turns=1, prompt=101, generated=3, observed=0)
    found = run(spec(models=1), workload)
    # 100 tokens in a chunk of 128; then three tokens that read 101, 102 and 103.
    chunk = 0.01 + 1e-5 * 101 / 2
    assert found["ttft_s"]["p50"] == pytest.approx(chunk + 0.002 + 101e-6)
    assert found["call_s"]["p50"] == pytest.approx(chunk + 0.006 + 306e-6)


@pytest.mark.parametrize("one_processor", [True, False])
def test_replies_that_are_covered_while_a_tool_works_shorten_the_next_call(one_processor) -> None:
    workload = Workload("react", models=2, turns=2, prompt=101, generated=64, observed=16, pause=1)
    now, ahead = (
        run(spec(models=2, one_processor=one_processor, reply_ahead=reply_ahead), workload)
        for reply_ahead in (False, True)
    )
    chunk = 0.004, 0.01
    step = 0.002
    for found, (longest, seen) in ((now, (chunk[1], 140)), (ahead, (chunk[0], 240))):
        # 80 tokens in a chunk of 128, or 16 in one of 32, and the token that is sampled.
        assert found["next_ttft_s"]["p50"] == pytest.approx(longest + step, abs=2e-5 * seen)
    # With each reply, the token before it that the decode module has read.
    assert ahead["prompt_tokens"]["computed"] == now["prompt_tokens"]["computed"] - 3 * 65
    assert ahead["generated_tokens"] == now["generated_tokens"]
    assert now["seconds"] - ahead["seconds"] == pytest.approx(3 * 0.006, abs=2e-3)


@pytest.mark.parametrize("pattern", ["react", "reflexion", "fanout"])
@pytest.mark.parametrize("shared", [True, False])
def test_tokens_are_computed_as_often_as_the_limits_say(pattern, shared):
    workload = replace(REACT, pattern=pattern)
    found = run(spec(shared=shared), workload, sessions=3, live=2)
    calls = workload.calls()
    count = shared_prefill_tokens if shared else isolated_prefill_tokens
    # The last token of a prompt is the decode module's: one less for each cache.
    caches = 1 if shared else 4
    assert found["engines"]["computed_tokens"] == 3 * (count(calls) - caches)
    assert found["generated_tokens"] == 3 * len(calls) * 6
    origins = found["prompt_tokens"]
    assert origins["computed"] - 3 * len(calls) == found["engines"]["computed_tokens"]
    assert (origins["other_model"] > 0) == shared


def test_saturated_processors_reach_g_max():
    # One processor, which is never idle, and costs that do not grow with the context.
    flat = TableCosts(
        {32: Line(0.008, 0), 128: Line(0.032, 0)},
        {size: Line(0.001 * size, 0) for size in range(1, 17)},
        padded=False,
    )
    few = replace(REACT, prompt=225, generated=8, observed=24)  # prompts grow by whole chunks
    figures = [
        run(spec(shared=shared, one_processor=True, costs=flat, pages=(4000, 4000)), few, 24, 8)
        for shared in (True, False)
    ]
    gain = figures[0]["sessions_per_s"] / figures[1]["sessions_per_s"]
    prefill = prefill_seconds(flat, few, CHUNKS, 16, True)
    assert figures[0]["engines"]["prefill_s"] == pytest.approx(24 * prefill)
    decode = figures[0]["engines"]["decode_s"] / 24
    others = figures[1]["engines"]
    isolated = prefill_seconds(flat, few, CHUNKS, 16, False)
    assert isolated / prefill == pytest.approx(rho(few.calls()), rel=0.05)
    assert others["prefill_s"] == pytest.approx(24 * isolated)
    ideal = g_max(isolated / prefill, prefill, decode)
    assert gain == pytest.approx(ideal, rel=0.1)
    # The processor is never idle: throughput is one over the work of a session.
    assert figures[0]["sessions_per_s"] == pytest.approx(1 / (prefill + decode), rel=1e-6)


def test_split_engines_reach_the_slower_sides_bound():
    slow_prefill = TableCosts({32: Line(0.2, 0), 128: Line(0.8, 0)}, COSTS.steps)
    system = spec(costs=slow_prefill, engines=(2, 1), pages=(4000, 4000))
    found = run(system, sessions=60, live=20)
    expected = bound(
        (slow_prefill, slow_prefill),
        (2, 1),
        REACT,
        (CHUNKS, BATCHES),
        16,
        shared=True,
        groups=4,
        live=20,
    )
    assert expected.limit == "prefill"
    assert found["sessions_per_s"] == pytest.approx(expected.prefill, rel=0.1)
    assert found["engines"]["prefill_busy"] > 0.9 > 0.5 > found["engines"]["decode_busy"]


def test_one_group_decodes_in_one_batch():
    apart, together = (run(spec(one_group=g), sessions=16, live=8) for g in (False, True))
    steps = [found["engines"]["sequences_per_step"] for found in (apart, together)]
    assert steps[1] > 1.2 * steps[0]
    assert together["generated_tokens_per_s"] > apart["generated_tokens_per_s"]


def test_small_pools_forget_but_lose_no_call():
    small = run(spec(pages=(30, 30), shared=False), sessions=12, live=6)
    large = run(spec(shared=False), sessions=12, live=6)
    assert small["calls"] == large["calls"] == 96
    assert small["prompt_tokens"]["cached"] < large["prompt_tokens"]["cached"]
    assert small["generated_tokens_per_s"] < large["generated_tokens_per_s"]


def test_full_pools_preempt_the_youngest_and_everybody_ends():
    workload = Workload("react", models=1, turns=1, prompt=33, generated=100, observed=0)
    found = run(spec(pages=(200, 24), models=1), workload, sessions=8, live=8)
    assert found["engines"]["preemptions"] > 0
    assert found["generated_tokens"] == 800


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["react", "reflexion", "fanout"]),
    st.booleans(),
    st.integers(12, 60),
    st.integers(12, 60),
    st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 3)]),
    st.integers(1, 9),
)
def test_nothing_is_lost_or_held_at_the_end(pattern, shared, prefill, decode, engines, live):
    system = System(spec(shared=shared, pages=(prefill, decode), engines=engines))
    workload = replace(REACT, pattern=pattern, prompt=40, observed=4)
    records = SimPlayer(system, workload).play(Load(10, live, 0.0, 0))
    calls = [call for record in records for call in record.calls]
    assert len(calls) == 10 * 8
    for call in calls:
        assert len(call.arrivals) == call.generated == 6
        assert call.asked < call.arrivals[0] <= call.arrivals[-1] == call.end
        assert call.cached is not None
        assert call.cached < call.prompt
    for engine in (*system.prefill, *system.decode):
        engine.cache.check(idle=True)
        assert engine.executor.peak_pages <= engine.cache.num_usable


def test_poisson_arrivals_wait_for_a_slot():
    found = simulate(spec(), REACT, Load(40, 2, 50.0, 0), warmup=2)
    relaxed = simulate(spec(), REACT, Load(40, 40, 0.5, 0))
    assert found["sessions"] == relaxed["sessions"] == 40
    assert found["session_s"]["p95"] > 3 * relaxed["session_s"]["p95"]
    assert relaxed["sessions_per_s"] == pytest.approx(0.5, rel=0.3)


def test_a_quantum_lets_rows_of_a_model_gather():
    each, gathered = (
        run(replace_quantum(spec(models=4, one_processor=True), quantum), sessions=16, live=8)
        for quantum in (1, 32)
    )
    steps = [found["engines"]["sequences_per_step"] for found in (each, gathered)]
    assert steps[1] > 1.3 * steps[0]
    assert gathered["generated_tokens_per_s"] > each["generated_tokens_per_s"]


def replace_quantum(system: SystemSpec, quantum: int) -> SystemSpec:
    [server] = system.servers
    settings = replace(server.settings, group_quantum=quantum)
    return replace(system, servers=[replace(server, settings=settings)])
