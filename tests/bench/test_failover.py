"""bench failover: what it makes of what came when, and a tiny cluster whose worker is killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pshare_jax.bench.__main__ import main
from pshare_jax.bench.failover import Kill, failed, figures, lines
from pshare_jax.bench.failover_cluster import held_by_model, placed, settings_of
from pshare_jax.bench.failover_streams import Answer, gap_around
from pshare_jax.convert.orbax import write_decode, write_prefill
from pshare_jax.errors import BenchmarkError, ConfigError
from pshare_jax.models.decoder import init_weights
from tests.e2e.conftest import TINY_VOCAB, write_config
from tests.helpers import tiny_config
from tests.text.tiny import write_byte_level


def answer(*times: float, ids: int = 2, error: str = "") -> Answer:
    return Answer([(when, ids) for when in times], list(range(ids * len(times))), "x", error=error)


def test_the_gap_is_the_longest_that_the_kill_is_in():
    times = [1.0, 2.0, 9.0, 10.05, 13.0, 30.0]
    # One token was on its way at 10.0, when the worker was killed.
    assert gap_around(times, 10.0, slack=0.25) == pytest.approx(2.95)
    assert gap_around(times, 10.0, slack=0.0) == pytest.approx(1.05)
    assert gap_around(times, 30.0, slack=0.25) is None
    assert gap_around(times, 0.5, slack=0.25) is None
    assert gap_around([], 10.0, slack=0.25) is None


def test_figures():
    hit = [answer(1.0, 2.0), answer(9.0, 14.0, 15.0)]
    other = [answer(8.0, 9.5, 10.5, 16.0)]
    broken = [answer(9.0, error="gone"), answer(25.0, 40.0)]
    kill = Kill("decode1", 10.0, 20.0, {0: (1, "decode1"), 1: (0, "decode0"), 2: (0, "decode1")})
    alone = [hit[1], other[0], broken[1]]
    result = figures([hit, other, broken], alone, kill, window=10.0)
    assert result["killed"] == "decode1"
    assert result["away_seconds"] == 10.0
    # The broken one has no token after it.
    assert result["gaps"] == {
        "its streams": {"streams": 1, "p50": 5.0, "p95": 5.0, "worst": 5.0},
        "other streams": {"streams": 1, "p50": 1.0, "p95": 1.0, "worst": 1.0},
    }
    # Two tokens an event: at 1, 2, 8, 9, 9, 9.5; at 10.5, 14, 15, 16; at 25.
    assert result["tokens_per_s"] == {"before": 1.2, "while it was away": 0.8, "after": 0.2}
    assert (result["requests"], result["failed"], result["errors"]) == (5, 1, ["gone"])
    # The stream's first answer is shorter than alone.
    assert (result["compared"], result["different"]) == (4, 1)
    assert failed(result)
    assert not failed({**result, "failed": 0, "different": 0})
    assert lines(result) == [
        "decode1 was killed, and back after 10.0 s:",
        "  longest wait for a token around it, 1 its streams: p50 5.00 s, p95 5.00 s, worst 5.00 s",
        "  longest wait for a token around it, 1 other streams: p50 1.00 s, p95 1.00 s, "
        "worst 1.00 s",
        "  tokens/s before: 1.2",
        "  tokens/s while it was away: 0.8",
        "  tokens/s after: 0.2",
        "  1 of 5 requests failed, 1 of 4 answers were other than alone",
        "  gone",
    ]


def test_nobody_else_had_streams():
    kill = Kill("decode0", 2.0, 3.0, {0: (0, "decode0")})
    one = answer(1.0, 4.0)
    result = figures([[one]], [one], kill, window=1.0)
    assert result["gaps"]["other streams"] == {"streams": 0}
    assert "  longest wait for a token around it, 0 other streams: none" in lines(result)


def test_workers_say_whose_sequences_they_have():
    text = (
        "# TYPE vllm:num_requests_running gauge\n"
        'vllm:num_requests_running{model_name="a"} 1.0\n'
        'vllm:num_requests_running{model_name="b"} 0.0\n'
        "# TYPE vllm:num_requests_waiting gauge\n"
        'vllm:num_requests_waiting{model_name="a"} 1.0\n'
        'vllm:num_requests_waiting{model_name="c"} 1.0\n'
    )
    assert held_by_model(text) == {"a": 2, "c": 1}
    held = {"decode0": {"a": 1, "b": 1, "c": 2}, "decode1": {"b": 1, "d": 1}}
    # Two workers have one of b, and one has two of c: nobody knows whose.
    assert placed(held, list("abcde")) == {"a": "decode0", "d": "decode1"}


def test_each_stream_has_a_model_of_its_own(tmp_path: Path):
    file = tmp_path / "serve.yaml"
    models = [{"name": "a", "checkpoint": "x"}, {"name": "b", "checkpoint": "y"}]
    file.write_text(yaml.safe_dump({"base": "z", "models": models, "decode": {"num_pages": 9}}))
    settings = settings_of(file, 5)
    assert [(m["name"], m["checkpoint"]) for m in settings["models"]] == [
        ("a", "x"),
        ("b", "y"),
        ("a-again1", "x"),
        ("b-again1", "y"),
        ("a-again2", "x"),
    ]
    assert settings["prefill"] == {"engines": 1}
    assert settings["decode"] == {"num_pages": 9, "engines": 2}
    assert settings["cluster"] == {"launcher": "local", "frontends": 1}
    with pytest.raises(ConfigError, match="there is no configuration file"):
        settings_of(tmp_path / "absent.yaml", 5)
    file.write_text("base: z\n")
    with pytest.raises(ConfigError, match="names no models"):
        settings_of(file, 5)


def test_an_error_in_a_stream_is_one():
    with pytest.raises(BenchmarkError, match=r"an error in the stream: \{'message': 'gone'\}"):
        Answer().take({"error": {"message": "gone"}})


@pytest.mark.parametrize("flag", ["--streams=1", "--reply=8", "--prompt=0", "--warm_seconds=-1"])
def test_options_that_make_no_sense(flag: str, capsys: pytest.CaptureFixture[str]):
    assert main(["failover", flag]) == 2
    name = flag.removeprefix("--").partition("=")[0]
    assert f"pshare_jax.bench: {name}: must " in capsys.readouterr().err


@pytest.mark.chaos
def test_a_decode_worker_of_a_tiny_cluster_is_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = tiny_config(vocab_size=TINY_VOCAB, max_position_embeddings=2048)
    tokenizer = write_byte_level(tmp_path / "tokenizer")
    files = {path.name: path.read_bytes() for path in tokenizer.iterdir()}
    base = write_prefill(tmp_path / "base", config, init_weights(config, 0), files)
    write_decode(tmp_path / "coder", base, init_weights(config, 1), cache_conditioned=True)
    coder = {"name": "coder", "checkpoint": str(tmp_path / "coder")}
    decode = {"batch_buckets": [4], "max_num_seqs": 4, "replay_buckets": [16], "max_full": 4}
    file = write_config(
        tmp_path, models=[coder], prefill={"chunk_buckets": [64]}, decode=decode, server={}
    )
    flags = [f"--config={file}", "--serve=[]", "--streams=4", "--prompt=80", "--reply=500"]
    flags += ["--warm_seconds=0", "--window_seconds=1.5", f"--json={tmp_path}/out.json"]
    assert main(["failover", *flags]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["killed"] in ("decode0", "decode1")
    assert (result["failed"], result["errors"], result["different"]) == (0, [], 0)
    assert result["compared"] == result["requests"] >= 4
    gaps = result["gaps"]
    # Most of the streams were in the middle of a request, and the one that died had most.
    assert 3 <= gaps["its streams"]["streams"] + gaps["other streams"]["streams"] <= 4
    assert gaps["its streams"]["streams"] >= gaps["other streams"]["streams"]
    assert gaps["its streams"]["worst"] >= gaps["its streams"]["p50"] > 0
    assert set(result["tokens_per_s"]) == {"before", "while it was away", "after"}
    assert min(result["tokens_per_s"].values()) >= 0
    assert "  0 of " in capsys.readouterr().out
