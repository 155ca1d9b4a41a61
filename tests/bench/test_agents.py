"""The whole command: against a scripted engine, and against two servers of a tiny model."""

import asyncio
import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pshare_jax.bench import agents
from pshare_jax.bench.__main__ import main
from pshare_jax.bench.agents import AgentsOptions
from pshare_jax.bench.agents_calibrate import Costs, session_costs
from pshare_jax.bench.agents_load import Load
from pshare_jax.bench.agents_targets import find_target, open_http, started
from pshare_jax.bench.agents_workload import Workload
from pshare_jax.bench.limits import isolated_prefill_tokens, rho, shared_prefill_tokens
from pshare_jax.config_files import load_serve_config
from pshare_jax.convert.orbax import write_prefill
from pshare_jax.errors import BenchmarkError
from pshare_jax.models.decoder import init_weights
from pshare_jax.text.tokenizer import Tokenizer
from tests.helpers import tiny_config
from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import Client, running_server
from tests.text.tiny import write_byte_level

ROOT = Path(__file__).parents[2]
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
        "--sessions=4",
        "--sessions_per_live=2",
        "--warmup=1",
    )
    assert code == 0
    assert result is not None
    assert [run["concurrency"] for run in result["runs"]] == [1, 3]
    # At least four, and two for each that is live.
    for run, sessions in zip(result["runs"], [4, 6], strict=True):
        counts = (run["sessions"], run["calls"], run["generated_tokens"])
        assert counts == (sessions, sessions * 4, sessions * 16)
        assert run["call_s"]["p99"] >= run["call_s"]["p50"] >= run["ttft_s"]["p50"] > 0
        # Prompts of 64, 76, 88 and 100 tokens; only the second model reads another's pages.
        assert run["prompt_tokens"]["total"] == sessions * (64 + 76 + 88 + 100)
        assert run["prompt_tokens"]["other_model"] > 0
        assert run["server"]["prefill_tokens"]["other_model"] == run["prompt_tokens"]["other_model"]
        assert run["server"]["handoff_bytes"] > 0
    assert result["comparisons"] == []
    assert result["machine"]["packages"]["jax"]
    assert [e["model"] for e in result["targets"][0]["endpoints"]] == ["planner", "coder"]
    # Warm-up and both runs: 5 and 7 sessions of 4 calls, each with a context of its own.
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


@pytest.mark.parametrize("pattern", ["react", "reflexion", "fanout"])
def test_patterns_sweeps_and_arrivals(pattern, served, tokenizer_folder, tmp_path):
    code, result = play(
        tmp_path,
        f"--urls=[{served.url},{served.url}]",
        "--names=[coder,planner]",
        f"--tokenizer={tokenizer_folder}",
        f"--workload.pattern={pattern}",
        "--model_counts=[1,2]",
        "--rate=50",
        "--sessions=3",
        "--warmup=0",
        f"--plots={tmp_path / 'plots'}",
    )
    assert code == 0
    assert result is not None
    for run, count in zip(result["runs"], [1, 2], strict=True):
        shape = {"prompt": 64, "generated": 4, "observed": 8}
        calls = Workload(pattern=pattern, models=count, turns=4 // count, **shape).calls()
        assert run["models"] == count
        assert run["calls"] == 3 * 4
        assert run["prompt_tokens"]["total"] == 3 * sum(call.prompt for call in calls)
    models = [request.model for request in served.engine.submitted]
    assert set(models[:12]) == {"coder"}
    assert set(models[12:]) == {"coder", "planner"}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "concurrency.png",
        "models.png",
    }


class Forgetful(dict):
    def __setitem__(self, key, value):
        pass


def test_decode_is_not_measured_where_prompts_are_forgotten(served, tokenizer_folder):
    served.engine._index = Forgetful()
    encode = Tokenizer.load(tokenizer_folder).encode

    async def measure() -> Costs:
        async with open_http(10, None) as http:
            target = await find_target(http, "shared", [served.url], [], 2)
            load = Load(sessions=2, concurrency=2, rate=0.0, seed=0)
            shape = Workload(models=2, turns=1, prompt=32, generated=2)
            return await session_costs(http, target, shape, encode, load, {})

    with pytest.raises(
        BenchmarkError, match=r"shared: only 0 of \d+ prompt tokens were still cached"
    ):
        asyncio.run(measure())


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
        ([], "name servers: --urls, --shared, --isolated, --variants, --vllm.python or --llama"),
        (["--llama_cpp.binary=x", "--llama_cpp.model=y"], "its replies have no token ids"),
        (
            ["--vllm.python=x", "--vllm.model=y", "--vllm.each=false"],
            "vllm: nothing is started with `each` false and no `adapters`",
        ),
        (["--shared=a.yaml", "--baselines={llama.cpp: x}"], "baselines: the name 'llama.cpp'"),
        (["--shared=absent.yaml", "--tokenizer=x"], "absent.yaml"),
        (["--urls=[http://127.0.0.1:9]", "--model_counts=[3]"], "cannot be divided among 3"),
        (["--urls=[http://127.0.0.1:9]", "--concurrency=[0]"], "concurrency: must be"),
        (["--urls=[http://127.0.0.1:9]", "--sessions=0"], "sessions: must be"),
        (["--urls=[http://127.0.0.1:9]", "--sessions_per_live=-1"], "sessions_per_live: must not"),
        (["--urls=[http://127.0.0.1:9]"], "tokenizer: name the folder"),
        (["--urls=[http://127.0.0.1:9]", "--checkouts={old: x}"], "checkouts: they run the"),
        (["--shared=a.yaml", "--checkouts={old: absent}"], "checkouts.old: there is no checkout"),
        (["--shared=a.yaml", "--checkouts={isolated: x}"], "checkouts: the name 'isolated'"),
        (["--shared=a.yaml", "--baselines={shared: x}"], "baselines: the name 'shared'"),
        (
            ["--variants={a: a.yaml}", "--baselines={a: b.yaml}"],
            "baselines: the name 'a' has another meaning already",
        ),
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


def tiny_servers(folder: Path) -> list[str]:
    """Configurations of one tiny base under two names: sharing, and not."""
    config = tiny_config(vocab_size=416, max_position_embeddings=512)
    tokenizer = write_byte_level(folder / "tokenizer")
    files = {path.name: path.read_bytes() for path in tokenizer.iterdir()}
    write_prefill(folder / "base", config, init_weights(config, 0), files)
    flags = []
    for sharing in ("shared", "isolated"):
        served = {
            "base": str(folder / "base"),
            "models": [{"name": name, "sharing": sharing} for name in ("planner", "coder")],
            "max_model_len": 256,
            "page_size": 16,
            "reply_kv": "off",  # replies that are covered ahead depend on who is quicker
            "compilation_cache_dir": str(ROOT / ".cache/xla-tests"),
            "prefill": {"chunk_buckets": [128]},
            "decode": {"batch_buckets": [4], "max_num_seqs": 4, "replay_buckets": [16]},
        }
        file = folder / f"{sharing}.yaml"
        file.write_text(yaml.safe_dump(served))
        flags.append(f"--{sharing}={file}")
    return flags


def test_baselines_have_their_own_configurations(monkeypatch):
    monkeypatch.chdir(ROOT)
    configs = AgentsOptions(
        shared="configs/bench/lora-cluster.yaml",
        baselines={"one process": "configs/bench/lora.yaml"},
    ).configs
    assert list(configs) == ["one process", "shared"]
    alone, cluster = (load_serve_config(file) for file in configs.values())
    assert (alone.cluster.launcher, cluster.cluster.launcher) == ("none", "local")
    assert replace(cluster, cluster=alone.cluster) == alone


@pytest.mark.slow
def test_sharing_against_not_sharing(tmp_path, capsys):
    code, result = play(
        tmp_path, *tiny_servers(tmp_path), "--sessions=3", "--rounds=2", "--concurrency=[2]"
    )
    assert code == 0
    assert result is not None
    # Interleaved, and who comes first alternates.
    order = [run["target"] for run in result["runs"]]
    assert order == ["isolated", "shared", "shared", "isolated"]
    workload = Workload(models=2, turns=2, prompt=64, generated=4, observed=8)
    # Each call's last prompt token is the decode module's own, and never prefilled; headings of
    # two sessions may begin with the same few tokens.
    for run in result["runs"]:
        sharing = run["target"] == "shared"
        count = shared_prefill_tokens if sharing else isolated_prefill_tokens
        models = 1 if sharing else 2
        computed = run["server"]["prefill_tokens"]["computed"]
        most = 3 * (count(workload.calls()) - models)
        assert 0.95 * most < computed <= most
        assert (run["prompt_tokens"]["other_model"] > 0) == sharing
        assert run["server"]["compiles"] == 0
        assert run["server"]["busy_seconds"].keys() == {"prefill0", "decode0"}
        assert run["server"]["peak_kv_bytes"]["prefill0"] > 0
    for name in ("isolated", "shared"):
        assert result["configs"][name]["decode"]["group_quantum"] == 32
        assert {m["sharing"] for m in result["configs"][name]["models"]} == {name}
    [row] = result["comparisons"]
    assert (row["target"], row["baseline"], row["models"]) == ("shared", "isolated", 2)
    first, second = (
        next(r for r in result["runs"] if r["target"] == name and r["round"] == 0)
        for name in ("shared", "isolated")
    )
    ratio = first["generated_tokens_per_s"] / second["generated_tokens_per_s"]
    assert ratio in row["best"]["throughput"].values()
    [limit] = result["limits"]
    assert limit["rho"] == pytest.approx(rho(workload.calls()))
    assert limit["prefill_s"] > 0
    assert limit["decode_s"] > 0
    assert 1 < limit["g_max"] < limit["rho"]
    assert limit["achieved"] == row["best"]["throughput"]["median"]
    assert "G_max" in capsys.readouterr().out
    reported(tmp_path, result)


def reported(folder: Path, result: dict) -> None:
    """`bench report` puts the result's figures into a document, with its plot beside."""
    document = folder / "docs" / "doc.md"
    document.parent.mkdir()
    document.write_text("a\n<!-- agents: begin -->\nold\n<!-- agents: end -->\nb\n")
    files = [f"--results=[{folder}/out/result.json]", f"--plots={folder}/docs/plots"]
    assert main(["report", *files, f"--document={document}"]) == 0
    text = document.read_text()
    assert "old" not in text
    assert "### Agents\n\n`react`: 4 calls a session, 64 tokens of context" in text
    assert text.count("| isolated | 2 | 2 | ") == text.count("| shared | 2 | 2 | ") == 1
    ratio = result["comparisons"][0]["best"]["throughput"]
    expected = f"{ratio['median']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})"
    assert f"| shared : isolated | 2 | 2 : 2 | {expected} |" in text
    [limit] = result["limits"]
    assert f"| {limit['g_max']:.2f} | {limit['achieved']:.2f} |" in text
    assert "![Agents](plots/result-concurrency.png)" in text
    assert (document.parent / "plots/result-concurrency.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["react", "reflexion", "models", "vllm", "vllm-long"])
def test_configurations_have_room_for_every_live_session(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    seen = []

    def keep(options: AgentsOptions, progress) -> dict:
        seen.append(options)
        raise BenchmarkError("enough")

    monkeypatch.setattr(agents, "run", keep)
    assert main(["agents", f"--config=configs/bench/{name}.yaml", "--sessions=4"]) == 2
    [options] = seen
    assert options.sessions == 4
    for server, config in options.configs.items():
        served = load_serve_config(config, *options.server_args)
        assert {model.sharing for model in served.models} == {
            "isolated" if server == "isolated" else "shared"
        }
        for workload in options.workloads():
            assert served.max_model_len >= workload.longest
            assert len(served.models) >= workload.models
            copies = workload.models if server == "isolated" else 1
            tokens = max(options.concurrency) * copies * workload.longest
            assert (
                min(served.prefill.num_pages, served.decode.num_pages) * served.page_size > tokens
            )


def test_a_benchmark_that_is_ended_stops_its_servers():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, started({}, [], {}):
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_checkout_runs_its_own_code_in_its_folder(tmp_path):
    package = tmp_path / "pshare_jax" / "serve"
    package.mkdir(parents=True)
    (tmp_path / "pshare_jax" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import os, sys, time\n"
        "print('pshare_jax: ready at', os.getcwd(), *sys.argv[1:], flush=True)\n"
        "time.sleep(60)\n"
    )
    configs = {"before": "configs/a.yaml"}
    with started(configs, ["--x=1"], {"before": str(tmp_path)}) as addresses:
        assert addresses == {"before": f"{tmp_path} --port=0 --config=configs/a.yaml --x=1"}
