"""Every file of examples/ runs as its first lines say, on tiny models."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pshare_jax.convert.manifest import read_manifest
from pshare_jax.convert.orbax import write_decode
from pshare_jax.core.split_rule import Invocation
from pshare_jax.models.weights import lora_specs
from pshare_jax.serve.process import running_server
from tests.e2e.conftest import ROOT, write_config
from tests.train.helpers import chats, write_jsonl

pytestmark = pytest.mark.e2e

EXAMPLES = ROOT / "examples"
CLUSTER = "test_cluster_store.py"
INVOCATION = (260, 261)
# One device and one size of each: an example is about what it does, not about how fast.
SMALL = {
    "prefill": {"chunk_buckets": [256]},
    "decode": {"batch_buckets": [1], "max_num_seqs": 1, "replay_buckets": [16]},
}


def run(name: str, *args: str) -> str:
    """The output of an example that ended well."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *args],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_listed_and_tested():
    names = {path.name for path in EXAMPLES.glob("*.py")}
    about = (EXAMPLES / "README.md").read_text()
    assert set(re.findall(r"\((\w+\.py)\)", about)) == names
    # That of a cluster is asked where a cluster runs.
    texts = [(ROOT / "tests/e2e" / name).read_text() for name in (Path(__file__).name, CLUSTER)]
    assert names == set(re.findall(r'run\(\s*"(\w+\.py)"', "".join(texts)))


def test_agents_over_one_context(tiny_server):
    out = run(
        "agents_over_one_context.py",
        f"--url={tiny_server}/v1",
        "--max-tokens=4",
        "--models",
        "planner",
        "coder",
        "critic",
    )
    rows = [line.split(maxsplit=4) for line in out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["planner", "coder", "critic"] * 3
    prompts, cached, shared = (np.array([int(row[i]) for row in rows]) for i in (1, 2, 3))
    # Each prompt contains the one before; all of that but its last token was computed then, and
    # the reply to it perhaps ahead.
    assert (np.diff(prompts) > 0).all()
    assert (cached[1:] >= prompts[:-1] - 1).all()
    assert (cached < prompts).all()
    assert (shared[1:] > 0).all()


def test_openai_agents(tiny_server):
    models = ["planner", "coder", "critic"]
    out = run("openai_agents.py", f"--url={tiny_server}/v1", "--max-tokens=4", "--models", *models)
    heads = [line for line in out.splitlines() if not line.startswith(" ")]
    found = [re.match(r"(\w+) \((\w+)\), (\d+) of (\d+) prompt", head).groups() for head in heads]
    assert [(name, served) for name, served, _, _ in found] == [
        ("planner", "planner"),
        ("writer", "coder"),
        ("critic", "critic"),
    ]
    cached, prompts = ([int(row[i]) for row in found] for i in (2, 3))
    # What is between them, a reply, may have been covered ahead.
    assert prompts[0] - 1 <= cached[1] < prompts[1]
    assert prompts[1] - 1 <= cached[2] < prompts[2]


def test_langgraph_agents(tiny_server):
    out = run(
        "langgraph_agents.py",
        f"--url={tiny_server}/v1",
        "--max-tokens=4",
        "--writer=planner",
        "--critic=critic",
    )
    found = [re.match(r"(\w+): (\d+) of (\d+) prompt", line).groups() for line in out.splitlines()]
    assert [row[0] for row in found] == ["planner", "critic"] * 2
    assert all(int(cached) > 0 for _, cached, _ in found[1:])


def test_activated_lora(tiny_folder, tmp_path, monkeypatch):
    base = read_manifest(tiny_folder / "base")
    rng = np.random.default_rng(4)
    targets = ("q", "k", "o")
    weights = {
        name: rng.normal(0, 0.3, spec.shape).astype(np.float32)
        for name, spec in lora_specs(base.config, 4, targets).items()
    }
    write_decode(
        tmp_path / "mine",
        base,
        weights,
        tail=Invocation(INVOCATION),
        cache_conditioned=True,
        lora_rank=4,
        lora_alpha=8.0,
        lora_targets=targets,
    )
    entries = [{"name": "base"}, {"name": "mine", "checkpoint": str(tmp_path / "mine")}]
    # What a reply leaves in the cache is not what is asked here.
    config = write_config(tiny_folder, models=entries, reply_kv="off", **SMALL)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    with running_server([f"--config={config}"]) as url:
        out = run("activated_lora.py", f"--url={url}", "--model=mine", "--max-tokens=8")
    pattern = r"(.*): (\d+) of (\d+) prompt tokens from another model: (.*)"
    found = [re.fullmatch(pattern, line).groups() for line in out.splitlines()]
    assert [row[0] for row in found] == ["base", "mine, not invoked", "mine, invoked"]
    base_text, idle_text, invoked_text = (row[3] for row in found)
    assert base_text == idle_text != invoked_text
    length = int(found[0][2])
    assert [int(row[2]) for row in found] == [length, length, length + len(INVOCATION)]
    # Not invoked it reads its last token itself, as the base does; invoked, the invocation.
    assert [int(row[1]) for row in found] == [0, length - 1, length - 1]


def test_train_and_serve(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    data = write_jsonl(tmp_path / "train.jsonl", chats(8, seed=1))
    out = run(
        "train_and_serve.py",
        data,
        f"--base={tiny_folder / 'base'}",
        f"--output={tmp_path / 'run'}",
        "--rank=2",
        "--tail=2",
        "--epochs=1",
        "--batch-size=8",
        "--max-tokens=4",
    )
    assert json.loads((tmp_path / "run/decode_module/pshare.json").read_text())["kind"] == "decode"
    answers = [line for line in out.splitlines() if re.match("(base|mine): ", line)]
    counts = [
        [int(n) for n in re.findall(r"\d+", line.partition(" prompt")[0])] for line in answers
    ]
    (cached, prompt), (mine_cached, mine_prompt) = counts
    assert (cached, mine_prompt) == (0, prompt)
    assert mine_cached == prompt - 2
    assert f"{prompt - 2} from another model" in answers[1]
