"""`bench micro`: the rates are those of the windows they claim, and vLLM is measured in turn."""

from __future__ import annotations

import json
import sys
from collections import deque
from pathlib import Path

import pytest

from pshare_jax.bench import micro, micro_rates
from pshare_jax.bench.__main__ import main
from pshare_jax.bench.micro_rates import Rate, Rates
from pshare_jax.bench.micro_targets import Event, VllmTarget
from pshare_jax.convert.orbax import write_prefill
from pshare_jax.errors import BenchmarkError
from pshare_jax.models.decoder import init_weights
from tests.helpers import tiny_config
from tests.text.tiny import write_byte_level

# Takes requests by the interface of vLLM's engine; a step gives each one token.
FAKE_VLLM = """
import profile  # as torch does, by way of cProfile: ours must not be found in its place
import time
import types

from vllm.sampling_params import RequestOutputKind


class EngineArgs:
    def __init__(self, model, dtype, max_model_len, max_num_seqs, skip_tokenizer_init):
        if model == "broken":
            raise SystemExit(3)
        assert "pshare_jax" not in profile.__file__
        print("noise on standard output")


class SamplingParams:
    def __init__(self, temperature, max_tokens, ignore_eos, detokenize, output_kind):
        assert (temperature, ignore_eos, output_kind) == (0.0, True, RequestOutputKind.DELTA)
        self.max_tokens = max_tokens


class LLMEngine:
    @classmethod
    def from_engine_args(cls, args):
        engine = cls()
        engine.left = {}
        return engine

    def has_unfinished_requests(self):
        return bool(self.left)

    def add_request(self, request_id, prompt, params):
        assert prompt["prompt_token_ids"]
        self.left[request_id] = params.max_tokens

    def abort_request(self, request_ids):
        for request_id in request_ids:
            del self.left[request_id]  # the worker aborts no request that has ended

    def step(self):
        outputs = []
        time.sleep(0.01)
        for request_id in list(self.left):
            self.left[request_id] -= 1
            done = not self.left[request_id]
            if done:
                del self.left[request_id]
            made = types.SimpleNamespace(token_ids=[1])
            outputs.append(
                types.SimpleNamespace(request_id=request_id, outputs=[made], finished=done)
            )
        return outputs
"""


@pytest.fixture
def fake_vllm(tmp_path, monkeypatch) -> str:
    """An interpreter in which something that looks like vLLM is installed."""
    site = tmp_path / "site"
    (site / "vllm").mkdir(parents=True)
    (site / "vllm/__init__.py").write_text(FAKE_VLLM)
    kinds = 'class RequestOutputKind:\n    DELTA = "delta"\n'
    (site / "vllm/sampling_params.py").write_text(kinds)
    for name, version in (("vllm", "9.9"), ("torch", "8.8")):
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    return sys.executable


class Clocked:
    """A target whose every event takes `seconds` of a clock that only it moves."""

    def __init__(self, clock: list[float], seconds: float, log: list[str], name: str):
        self.clock, self.seconds, self.log, self.name = clock, seconds, log, name
        self.left: dict[str, int] = {}
        self.ended: deque[str] = deque()
        self.count = 0

    def submit(self, prompt, max_tokens, model):
        self.count += 1
        self.log.append(f"{self.name} {model} {len(prompt)} {max_tokens}")
        self.left[f"r{self.count}"] = max_tokens
        return f"r{self.count}"

    def next(self):
        if self.ended:
            return Event(self.ended.popleft(), 0, True)
        self.clock[0] += self.seconds
        request_id = next(iter(self.left))
        left = self.left.pop(request_id) - 1
        if left:
            self.left[request_id] = left  # the next row's turn comes first
        return Event(request_id, 1, not left)

    def abort(self, request_id):
        del self.left[request_id]
        self.ended.append(request_id)


def test_rates_are_those_of_the_window_and_targets_take_turns(monkeypatch):
    clock, log = [0.0], []
    monkeypatch.setattr(micro_rates.time, "perf_counter", lambda: clock[0])
    targets = {name: Clocked(clock, s, log, name) for name, s in (("a", 0.5), ("b", 0.25))}
    rates = Rates(targets, vocab=50, room=20, window=4, repeats=2, seed=0, clock=lambda: clock[0])
    assert rates.prefill(10) == {"a": [20.0, 20.0], "b": [40.0, 40.0]}
    assert log == ["a base 10 1", "b base 10 1"] * 2
    log.clear()
    assert rates.decode(6, ["base", "lora0"]) == {"a": [2.0, 2.0], "b": [4.0, 4.0]}
    warm = [f"{name} base 6 1" for name in "ab" for _ in range(2)]
    assert log == warm + ["a base 6 20", "a lora0 6 20", "b base 6 20", "b lora0 6 20"] * 2


def test_a_window_that_rows_do_not_live_through_is_refused():
    target = Clocked([0.0], 0.5, [], "a")
    rates = Rates({"a": target}, vocab=50, room=3, window=4, repeats=1, seed=0)
    with pytest.raises(BenchmarkError, match="a row ended before 4 tokens of every row"):
        rates.decode(6, ["base"])


def test_a_rate_has_median_and_extremes():
    assert Rate.of([3.0, 1.0, 2.0]) == Rate(2.0, 1.0, 3.0)


def test_vllm_behind_the_pipe(fake_vllm):
    target = VllmTarget(fake_vllm, "folder", 64, 4, 1)
    try:
        assert target.packages == {"vllm": "9.9", "torch": "8.8"}
        one = target.submit([1, 2], 2, "base")
        assert [target.next(), target.next()] == [Event(one, 1, False), Event(one, 1, True)]
        endless = target.submit([1, 2], 10**9, "base")
        assert target.next() == Event(endless, 1, False)
        target.abort(endless)
        while not (event := target.next()).finished:
            pass
        assert event == Event(endless, 0, True)
    finally:
        target.close()


def test_vllm_that_does_not_start(fake_vllm):
    with pytest.raises(BenchmarkError, match="ended with code 3"):
        VllmTarget(fake_vllm, "broken", 64, 4, 1)
    with pytest.raises(BenchmarkError, match="no-python: cannot be started: No such file"):
        VllmTarget("no-python", "folder", 64, 4, 1)


@pytest.fixture
def base(tmp_path) -> Path:
    config = tiny_config(vocab_size=416, max_position_embeddings=512)
    tokenizer = write_byte_level(tmp_path / "tokenizer")
    files = {path.name: path.read_bytes() for path in tokenizer.iterdir()}
    write_prefill(tmp_path / "base", config, init_weights(config, 0), files)
    return tmp_path / "base"


def test_this_engine_beside_vllm(base, fake_vllm, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(micro, "PREFILL_LENGTHS", (48, 96))
    monkeypatch.setattr(micro, "BATCHES", (2,))
    monkeypatch.setattr(micro, "LORA_ROWS", 2)
    flags = [f"--base={base}", "--contexts=[16,40]", "--window=12", "--repeats=3", "--lora_rank=2"]
    flags += ["--page_size=16", "--chunk=64", "--kernel_backend=xla", "--dtype=float32"]
    flags += [f"--vllm.python={fake_vllm}", "--vllm.model=folder", f"--json={tmp_path}/out.json"]
    flags += [f"--trace={tmp_path}/traces"]
    assert main(["micro", *flags]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["backend"] == "xla"
    assert result["dtype"] == "float32"
    assert result["compiles"] == 0
    profiles = result["profiles"]
    assert set(profiles) == {"prefill-48", "prefill-96", "decode-16-2", "decode-40-2"}
    for name, profile in profiles.items():
        assert profile["seconds"] > 0
        assert 0 <= profile["idle"] < 1
        program = profile["programs"]["decode_steps" if "decode" in name else "prefill_chunk"]
        assert 0 < program["share"] < 1
        assert sum(program["operations"].values()) == pytest.approx(1)
        assert any(kind.endswith(("fusion", "dot")) for kind in program["operations"])
    assert len(list((tmp_path / "traces").glob("*/plugins/profile/*/*.xplane.pb"))) == 4
    vllm = result["vllm"]
    assert vllm["packages"] == {"vllm": "9.9", "torch": "8.8"}
    for figures in (result, vllm, vllm["ratios"]):
        assert set(figures["prefill"]) == {"48", "96"}
        assert {context: set(rates) for context, rates in figures["decode"].items()} == {
            "16": {"2"},
            "40": {"2"},
        }
        for rate in (*figures["prefill"].values(), *figures["decode"]["40"].values()):
            assert 0 < rate["low"] <= rate["median"] <= rate["high"]
    # Ratios are of single repeats: none lies beyond the extremes of both sides.
    ours, theirs = result["prefill"]["48"], vllm["prefill"]["48"]
    ratio = vllm["ratios"]["prefill"]["48"]
    assert ours["low"] / theirs["high"] <= ratio["low"] <= ratio["high"]
    assert ratio["high"] <= ours["high"] / theirs["low"]
    assert set(result["lora"]) == {"one module", "several modules"}
    assert "vLLM 9.9, median" in capsys.readouterr().out
