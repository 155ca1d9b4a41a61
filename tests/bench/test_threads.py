"""The simulation of the thread loop: by hand, and against steps that the kernels have cut."""

from __future__ import annotations

import numpy as np
import pytest

from pshare_jax.bench import threads, threads_report
from pshare_jax.bench.thread_loops import loop_seconds
from pshare_jax.bench.thread_steps import parts_of, step_bytes, steps_of
from pshare_jax.convert.conversions import import_model
from pshare_jax.errors import ConfigError
from pshare_jax.kernels.native.library import require_library
from pshare_jax.kernels.native.loop_trace import Call, Loop, traced
from tests.convert.helpers import model_config, random_weights, write_hf_folder
from tests.helpers import tiny_config


def test_one_thread_does_one_after_the_other():
    assert loop_seconds([1.0, 2.0, 3.0], 1, 0.5) == 6.0
    # A loop of one iteration opens no gate.
    assert loop_seconds([4.0], 64, 0.5) == 4.0
    assert loop_seconds([], 4, 0.5) == 0.0


def test_iterations_go_to_who_is_free_first():
    assert loop_seconds([5.0, 1.0, 1.0, 1.0], 2, 0.0) == 5.0
    assert loop_seconds([1.0, 1.0, 1.0, 5.0], 2, 0.0) == 6.0
    assert loop_seconds([2.0] * 7, 3, 0.0) == 6.0
    # More threads than iterations are of no use.
    assert loop_seconds([2.0, 3.0], 64, 0.0) == 3.0


def test_a_line_of_memory_goes_from_thread_to_thread():
    # Opened at 1, counter at 2; the other sees it at 2, has the gate at 3, and the counter at 4.
    # The caller is done at 12, has the counter at 13 and the gate at 14; the other, done at 14,
    # has the counter at 15 and the gate at 16, which the caller sees at 17.
    assert loop_seconds([10.0, 10.0], 2, 1.0) == 17.0
    # So a loop that is short takes longer with many threads than with one.
    assert loop_seconds([0.1] * 8, 8, 1.0) > loop_seconds([0.1] * 8, 1, 1.0)


def call(begin: float, *loops: tuple[str, list[float]], rest: float = 0.0) -> Call:
    made, now = [], begin
    for stage, seconds in loops:
        made.append(Loop(stage, np.asarray(seconds), now, now + sum(seconds)))
        now += sum(seconds)
    return Call(tuple(made), begin, now + rest)


def test_steps_end_with_the_head_and_medians_are_taken():
    calls = [call(0.0, ("head", [1.0]))]
    for step in range(3):
        begin = 10.0 * (step + 1)
        calls += [
            call(begin, ("norm", [1.0 + step]), ("q, k, v", [1.0, 2.0]), rest=0.25),
            call(begin + 6.5, ("head", [1.0])),
        ]
    steps = steps_of([*calls, call(99.0, ("norm", [1.0]))], cpu=40.0)
    assert [len(step.calls) for step in steps] == [2, 2, 2]
    parts = parts_of(steps)
    assert parts.loops["norm", 1].iterations.tolist() == [2.0]
    assert parts.loops["q, k, v", 2].iterations.tolist() == [1.0, 2.0]
    assert parts.loops["q, k, v", 2].times == 1.0
    assert parts.cpp == 0.25
    # Of the middle one: 7.5 s from its first call to its end, of which 6.25 in kernels.
    assert parts.xla == pytest.approx(1.25)
    assert parts.gap == pytest.approx(2.5)
    assert parts.host == pytest.approx(10.0 - 6.25)


def test_a_step_is_bounded_by_memory_and_by_the_host():
    steps = steps_of([call(0.0, ("head", [1.0])), call(1.0, ("head", [1.0] * 4))], cpu=2.0)
    quick = threads.predict(steps, 4, 0.0, 1e9, {})
    assert (quick["loops"], quick["seconds"]) == (1.0, 1.0)
    bound = threads.predict(steps, 4, 0.0, 1e9, {"head": 3e9})
    assert (bound["loops"], bound["stages"]["head"]["memory"]) == (3.0, 3.0)
    alone = threads.predict(steps, 1, 0.0, 1e9, {"head": 9e9})
    assert alone["loops"] == 4.0, "what was measured on one thread has waited for memory already"
    busy = [threads.Step(step.calls, step.wall, 10.0) for step in steps]
    assert threads.predict(busy, 4, 0.0, 1e9, {})["seconds"] == 6.0


def test_bytes_of_a_loop():
    read = step_bytes(tiny_config(hidden_size=64, intermediate_size=128, vocab_size=100), 2, 10)
    assert read["down"] == 2 * 64 * 128
    assert read["gate and up"] == 2 * read["down"]
    assert read["head"] == 2 * 64 * 100


def test_what_is_traced_is_what_the_kernels_run():
    library = require_library()
    counts = {}
    for team in (1, 4):
        with traced(team) as trace:
            library.share_out(3, 5, 1)
        counts[team] = [len(loop.seconds) for made in trace.calls for loop in made.loops]
        assert [len(made.loops) for made in trace.calls] == [3]
    assert counts[1] == counts[4] == [5, 5, 5]
    assert threads.line_of(library) >= 20e-9
    with pytest.raises(ConfigError, match="threads is 0"), traced(0):
        pass


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    config, folder = model_config(), tmp_path_factory.mktemp("threads")
    import_model(write_hf_folder(folder / "hf", config, random_weights(config)), folder / "base")
    options = threads.ThreadsOptions(
        base=str(folder / "base"), threads=[1, 2, 16], batches=[2], context=20, chunk=64, steps=2,
        repeats=1, gb_per_s=1000.0, page_size=16,
    )  # fmt: skip
    return threads.run(options)


def test_a_model(result):
    assert set(result["workloads"]) == {"prefill of 64 tokens", "decode, batch 2"}
    decode = result["workloads"]["decode, batch 2"]
    assert set(decode["predicted"]) == {1, 2, 16}
    assert set(decode["measured"]) == {n for n in (1, 2) if n <= result["cores"]}
    alone, many = decode["predicted"][1], decode["predicted"][16]
    assert alone["stages"]["q, k, v"]["loops"] == 2
    assert alone["stages"]["head"]["loops"] == 1
    assert many["stages"]["gate and up"]["iterations"] > alone["stages"]["gate and up"]["loops"]
    # On one thread what is played is what was traced.
    total = sum(stage["work"] for stage in alone["stages"].values())
    assert alone["loops"] == pytest.approx(total)


def test_what_is_printed(result):
    text = "\n".join(threads_report.lines(result))
    assert "**decode, batch 2**" in text
    assert "| head | 1 |" in text


def test_where_it_stops():
    predicted = {n: {"seconds": s} for n, s in {1: 8.0, 2: 4.0, 4: 2.5, 8: 2.4, 16: 1.0}.items()}
    assert threads_report.scales_to(predicted) == 4
    workload = {"measured": {1: 10.0}, "predicted": predicted}
    assert threads_report.errors(workload) == {1: pytest.approx(-0.2)}
