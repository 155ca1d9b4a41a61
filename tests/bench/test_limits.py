"""The limits against values worked out by hand, and against a session counted token by token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pshare_jax.bench import limits
from pshare_jax.bench.agents_workload import Workload
from pshare_jax.bench.limits import Call


def count(workload: Workload, *, shared: bool) -> int:
    """Prefill tokens of a session whose caches are sets of positions."""
    caches: dict[int, set[int]] = {}
    computed, context = 0, workload.prompt
    for step in workload.steps():
        for model in step.models:
            cache = caches.setdefault(0 if shared else model, set())
            for position in range(context):
                computed += position not in cache
                cache.add(position)
        context += len(step.models) * workload.generated + step.observed
    return computed


WORKLOADS = st.builds(
    Workload,
    pattern=st.sampled_from(["react", "reflexion", "fanout"]),
    models=st.integers(1, 5),
    turns=st.integers(1, 4),
    prompt=st.integers(1, 40),
    generated=st.integers(1, 6),
    observed=st.integers(0, 6),
)


@given(WORKLOADS)
def test_token_counts_are_those_of_a_counted_session(workload):
    calls = workload.calls()
    assert limits.shared_prefill_tokens(calls) == count(workload, shared=True)
    assert limits.isolated_prefill_tokens(calls) == count(workload, shared=False)
    assert 1 <= limits.rho(calls) <= workload.models


@given(WORKLOADS.filter(lambda w: w.pattern == "react"))
def test_closed_form_of_models_in_turn(workload):
    growth = workload.generated + workload.observed
    closed = limits.rho_in_turn(workload.models, workload.turns, workload.prompt, growth)
    assert limits.rho(workload.calls()) == pytest.approx(closed)


def test_rho_by_hand():
    # Four models, four turns, 512 + 72 a call: the last prompts are 1376, 1448, 1520, 1592.
    calls = Workload().calls()
    assert [call.prompt for call in calls[-4:]] == [1376, 1448, 1520, 1592]
    assert limits.isolated_prefill_tokens(calls) == 5936
    assert limits.rho(calls) == pytest.approx(5936 / 1592)
    assert limits.rho_in_turn(4, 4, 512, 72) == pytest.approx(3.7286, abs=1e-4)


def test_patterns_by_hand():
    shape = {"models": 3, "turns": 2, "prompt": 10, "generated": 2, "observed": 5}
    prompts = {
        "react": [10, 17, 24, 31, 38, 45],
        "reflexion": [10, 17, 19, 21, 28, 30],
        "fanout": [10, 10, 10, 21, 21, 21],
    }
    for pattern, lengths in prompts.items():
        calls = Workload(pattern=pattern, **shape).calls()
        models = [0, 1, 2, 0, 1, 2]
        assert calls == [Call(m, n) for m, n in zip(models, lengths, strict=True)]
    assert limits.rho(Workload(pattern="fanout", **shape).calls()) == 3
    assert Workload(pattern="reflexion", **shape).longest == 32


def test_g_max():
    assert limits.g_max(3.7, 70.0, 30.0) == pytest.approx(2.89)
    assert limits.g_max(4.0, 5.0, 0.0) == 4
    assert limits.g_max(4.0, 0.0, 5.0) == 1
    with pytest.raises(ValueError, match="not a session's times"):
        limits.g_max(4.0, 0.0, 0.0)


def test_the_best_split_reaches_g_max():
    prefill, decode, ratio = 7.0, 3.0, 3.7
    shares = [i / 10000 for i in range(1, 10000)]
    shared = max(limits.split_throughput(prefill, decode, s) for s in shares)
    isolated = max(limits.split_throughput(ratio * prefill, decode, s) for s in shares)
    assert shared == pytest.approx(1 / (prefill + decode), rel=1e-3)
    assert shared / isolated == pytest.approx(limits.g_max(ratio, prefill, decode), rel=1e-3)
    with pytest.raises(ValueError, match="between 0 and 1"):
        limits.split_throughput(1.0, 1.0, 1.0)


def test_kv_bytes_of_llama_8b_and_smollm2():
    assert limits.kv_bytes_per_token(32, 8, 128, 2) == 128 * 1024
    assert limits.kv_bytes_per_token(30, 3, 64, 2) == 22.5 * 1024
