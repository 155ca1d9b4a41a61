"""The whole command: against a scripted engine, and against two servers of a tiny model."""

import json
from collections.abc import Iterator

import pytest

from pshare_jax.bench.__main__ import main
from pshare_jax.text.tokenizer import Tokenizer
from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import Client, running_server
from tests.text.tiny import write_byte_level

SMALL = [
    "--workload.models=2",
    "--workload.turns=2",
    "--workload.prompt=64",
    "--workload.generated=4",
    "--workload.observed=8",
]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return write_byte_level(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def served(tokenizer_folder) -> Iterator[Client]:
    engine = fake_engine(Tokenizer.load(tokenizer_folder), fake_config(max_model_len=1024))
    with running_server(engine) as client:
        yield client


def play(folder, *flags: str, sizes=SMALL) -> tuple[int, dict | None]:
    file = folder / "out" / "result.json"
    code = main(["agents", *sizes, *flags, f"--json={file}"])
    return code, json.loads(file.read_text()) if file.is_file() else None


def test_a_server_that_runs_already(served, tokenizer_folder, tmp_path, capsys):
    code, result = play(
        tmp_path,
        f"--urls=[{served.url}/v1]",
        f"--tokenizer={tokenizer_folder}",
        "--concurrency=[1,3]",
        "--sessions=5",
        "--warmup=1",
    )
    assert code == 0
    assert result is not None
    assert [run["concurrency"] for run in result["runs"]] == [1, 3]
    for run in result["runs"]:
        assert (run["sessions"], run["calls"], run["generated_tokens"]) == (5, 20, 80)
        assert run["call_s"]["p99"] >= run["call_s"]["p50"] >= run["ttft_s"]["p50"] > 0
        # Prompts of 64, 76, 88 and 100 tokens; only the second model reads another's pages.
        assert run["prompt_tokens"]["total"] == 5 * (64 + 76 + 88 + 100)
        assert run["prompt_tokens"]["other_model"] > 0
        assert run["server"]["prefill_tokens"]["other_model"] == run["prompt_tokens"]["other_model"]
        assert run["server"]["handoff_bytes"] > 0
    assert result["comparisons"] == []
    assert result["machine"]["packages"]["jax"]
    assert [e["model"] for e in result["targets"][0]["endpoints"]] == ["planner", "coder"]
    # Warm-up and both runs: 2 * 6 sessions of 4 calls, each with a context of its own.
    assert len(served.engine.submitted) == 48
    assert len({r.prompt_token_ids[:20] for r in served.engine.submitted}) == 12
    out = capsys.readouterr().out
    assert "tok/s" in out
    assert "throughput" not in out


def test_contexts_grow_by_what_was_generated(served, tokenizer_folder, tmp_path):
    flags = [f"--urls=[{served.url}]", f"--tokenizer={tokenizer_folder}", "--warmup=0"]
    code, _ = play(tmp_path, *flags, "--sessions=1")
    assert code == 0
    first, second = (r.prompt_token_ids for r in served.engine.submitted[:2])
    tokenizer = served.engine.tokenizer
    reply = [*tokenizer.encode("hello world"), *[tokenizer.eos_token_ids[0]] * 4][:4]
    assert second[:64] == first
    assert list(second[64:68]) == reply
    code, _ = play(tmp_path, *flags, "--sessions=1", "--replies=scripted", "--seed=1")
    assert code == 0
    first, second = (r.prompt_token_ids for r in served.engine.submitted[4:6])
    assert second[:64] == first
    assert list(second[64:68]) != reply


def test_text_that_a_server_knows_is_refused(served, tokenizer_folder, tmp_path, capsys):
    flags = [f"--urls=[{served.url}]", f"--tokenizer={tokenizer_folder}", "--sessions=1"]
    assert play(tmp_path, *flags)[0] == 0
    assert main(["agents", *SMALL, *flags]) == 2
    assert "give another --seed" in capsys.readouterr().err


def test_a_context_that_is_too_long_gives_no_figures(served, tokenizer_folder, tmp_path, capsys):
    flags = [f"--urls=[{served.url}]", f"--tokenizer={tokenizer_folder}"]
    code, result = play(tmp_path, *flags, "--workload.prompt=1020")
    assert (code, result) == (2, None)
    error = capsys.readouterr().err
    assert "status 400" in error
    assert "maximum context length is 1024" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "name servers: --urls, --shared or --isolated"),
        (["--shared=absent.yaml", "--tokenizer=x"], "absent.yaml"),
        (["--urls=[http://127.0.0.1:9]", "--model_counts=[3]"], "cannot be divided among 3"),
        (["--urls=[http://127.0.0.1:9]", "--concurrency=[0]"], "concurrency: must be"),
        (["--urls=[http://127.0.0.1:9]", "--sessions=0"], "sessions: must be"),
        (["--urls=[http://127.0.0.1:9]"], "tokenizer: name the folder"),
    ],
)
def test_options_that_do_not_fit(flags, message, capsys):
    assert main(["agents", *SMALL, *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_server_that_is_not_there(tokenizer_folder, capsys):
    flags = ["--urls=[http://127.0.0.1:9]", f"--tokenizer={tokenizer_folder}"]
    assert main(["agents", *SMALL, *flags]) == 2
    assert "http://127.0.0.1:9/v1/models: ClientConnectorError" in capsys.readouterr().err


def test_more_models_than_are_served(served, tokenizer_folder, capsys):
    flags = [f"--urls=[{served.url}]", f"--tokenizer={tokenizer_folder}"]
    assert main(["agents", *flags, "--workload.models=4"]) == 2
    assert "4 models are needed, these are there: planner, coder, team/critic" in (
        capsys.readouterr().err
    )
