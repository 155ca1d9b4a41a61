"""The real server process and the real client, over a tiny random model."""

from __future__ import annotations

import concurrent.futures
import json
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator

import jax.numpy as jnp
import openai
import pytest

from pshare_jax.convert.orbax import load_weights, read_manifest
from pshare_jax.engine.monolithic import Monolithic
from pshare_jax.serve.__main__ import main
from pshare_jax.serve.process import server_process
from pshare_jax.text.tokenizer import Tokenizer
from tests.e2e import metrics
from tests.e2e.conftest import TINY_CONTEXT, write_config

CONTEXT = "the quick brown fox jumps over the lazy dog and then "


def test_models(api):
    models = {model.id: model.model_dump() for model in api.models.list()}
    assert list(models) == ["planner", "coder", "critic", "own"]
    assert {m["parent"] for m in models.values()} == {"base"}
    assert [m["sharing"] for m in models.values()] == ["shared"] * 3 + ["isolated"]


def test_served_tokens_are_the_oracles(api, tiny_folder):
    tokenizer = Tokenizer.load(tiny_folder / "base/tokenizer")
    config = read_manifest(tiny_folder / "base").config
    base = load_weights(tiny_folder / "base", dtype=jnp.float32)
    coder = load_weights(tiny_folder / "coder", dtype=jnp.float32)
    prompt = tokenizer.encode(CONTEXT * 3)
    oracle = Monolithic(config, 256)
    for model, prefill in (("coder", base), ("own", coder)):
        expected = oracle.generate(
            prefill, coder, prompt, 24, end_token_ids=tokenizer.eos_token_ids
        )
        answer = api.completions.create(
            model=model, prompt=prompt, max_tokens=24, temperature=0, logprobs=0
        )
        tokens = [token for token in expected if token not in tokenizer.eos_token_ids]
        assert answer.choices[0].text == tokenizer.decode(tokens)
        assert answer.usage.completion_tokens == len(expected)


def test_log_likelihoods_are_the_oracles(api, tiny_folder):
    """What lm-eval asks for: prompt and one token, the first entry null."""
    tokenizer = Tokenizer.load(tiny_folder / "base/tokenizer")
    config = read_manifest(tiny_folder / "base").config
    base = load_weights(tiny_folder / "base", dtype=jnp.float32)
    coder = load_weights(tiny_folder / "coder", dtype=jnp.float32)
    prompt = tokenizer.encode(CONTEXT)
    table = Monolithic(config, 256).prompt_logprobs(base, coder, prompt)
    expected = [float(table[i, token]) for i, token in enumerate(prompt)]
    answer = api.completions.create(
        model="coder", prompt=prompt, max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234
    )
    scores = answer.choices[0].logprobs
    assert scores.token_logprobs[0] is None
    assert len(scores.token_logprobs) == len(prompt) + 1
    assert scores.token_logprobs[1:-1] == pytest.approx(expected[1:], abs=1e-4)
    best = [max(top.values()) for top in scores.top_logprobs[1:-1]]
    assert best == pytest.approx(table[1:].max(axis=1).tolist(), abs=1e-4)


def test_a_module_is_loaded_while_the_server_runs(api, tiny_server):
    def post(path, **body):
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{tiny_server}/v1/{path}", data, headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read().decode()

    question = {"prompt": CONTEXT * 3, "max_tokens": 24, "temperature": 0}
    expected = api.completions.create(model="critic", **question).choices[0].text
    for inplace in (False, True):
        said = post("load_lora_adapter", lora_name="new", lora_path="critic", load_inplace=inplace)
        assert said == "Success: LoRA adapter 'new' added successfully."
        assert api.models.retrieve("new").model_dump()["kind"] == "full"
        assert api.completions.create(model="new", **question).choices[0].text == expected
    assert post("unload_lora_adapter", lora_name="new").endswith("removed successfully.")
    with pytest.raises(openai.NotFoundError):
        api.completions.create(model="new", **question)
    with pytest.raises(urllib.error.HTTPError, match="400"):
        post("load_lora_adapter", lora_name="base", lora_path="base")
    assert metrics.read(tiny_server)["pshare_compiles_total"] == {(): 0}


@pytest.fixture
def one_device(tiny_folder) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server of its own on one device, and its process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_NUM_CPU_DEVICES", "1")
        # It takes the one that its configuration names, which is the same.
        patch.delenv("JAX_COMPILATION_CACHE_DIR")
        with server_process([f"--config={write_config(tiny_folder)}"]) as running:
            yield running


def test_one_device_serves_the_same_until_sigterm_drains_it(api, one_device):
    """Prefill and decode over one pool, since there are not devices enough for two meshes. One test
    of both, as each would need a server that it may end."""
    question = {"prompt": CONTEXT * 9, "max_tokens": 24, "temperature": 0}
    url, process = one_device
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        for model in ("planner", "coder", "critic", "own"):
            expected = api.completions.create(model=model, **question)
            answer = client.completions.create(model=model, **question)
            assert answer.choices[0].text == expected.choices[0].text
        values = metrics.read(url)
    assert sum(value for _, value in values.get("pshare_handoff_bytes_total", {}).items()) == 0

    body = {"model": "coder", "prompt": "hi", "max_tokens": 400, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    metrics.eventually(lambda: metrics.pages_in_use(url) == 0)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(lambda: json.load(urllib.request.urlopen(request, timeout=60)))
        metrics.eventually(lambda: metrics.pages_in_use(url) > 0)
        process.send_signal(signal.SIGTERM)
        assert answer.result()["usage"]["completion_tokens"] == 400
    assert process.wait(timeout=30) == 0


def test_four_models_over_one_context_compute_it_once(api, tiny_server):
    prompt = "once " + CONTEXT * 20
    before = metrics.read(tiny_server)["pshare_prefill_tokens_total"]
    usages = [
        api.completions.create(model=model, prompt=prompt, max_tokens=4, temperature=0).usage
        for model in ("planner", "coder", "critic", "planner")
    ]
    after = metrics.read(tiny_server)["pshare_prefill_tokens_total"]
    cover = usages[0].prompt_tokens - 1
    details = [usage.prompt_tokens_details.model_dump() for usage in usages]
    assert [d["cached_tokens"] for d in details] == [0, cover, cover, cover]
    assert [d["shared_tokens"] for d in details] == [0, cover, cover, 0]
    grown = {key: value - before.get(key, 0) for key, value in after.items()}
    computed = sum(value for key, value in grown.items() if "computed" in key)
    assert computed == cover
    assert grown[("coder", "other_model")] == grown[("critic", "other_model")] == cover
    assert grown[("planner", "same_model")] == cover


def test_streams_run_side_by_side(api):
    def stream(seed: int) -> tuple[str, str]:
        options = {"model": ("planner", "coder", "critic", "own")[seed % 4], "seed": seed}
        prompt, limit = f"{seed} {CONTEXT}", 20
        chunks = api.completions.create(
            prompt=prompt, max_tokens=limit, temperature=0.8, stream=True, **options
        )
        streamed = "".join(chunk.choices[0].text for chunk in chunks)
        alone = api.completions.create(prompt=prompt, max_tokens=limit, temperature=0.8, **options)
        return streamed, alone.choices[0].text

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        pairs = list(pool.map(stream, range(16)))
    # A seed gives the same draws whatever else is in the batch.
    assert all(streamed == alone for streamed, alone in pairs)
    assert len({streamed for streamed, _ in pairs}) > 8


def test_chat_with_logprobs(api):
    answer = api.chat.completions.create(
        model="coder",
        messages=[{"role": "user", "content": "hello world"}],
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)
        assert token.logprob <= 0


def test_errors_are_typed(api):
    with pytest.raises(openai.NotFoundError, match="nobody"):
        api.completions.create(model="nobody", prompt="hi")
    with pytest.raises(openai.BadRequestError, match="context length"):
        api.completions.create(model="coder", prompt="hi", max_tokens=TINY_CONTEXT)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        api.completions.create(model="coder", prompt="hi", temperature=-1)
    assert api.completions.create(model="coder", prompt="hi", max_tokens=1).choices


def test_a_client_that_vanishes_gives_its_pages_back(tiny_server):
    metrics.eventually(lambda: metrics.pages_in_use(tiny_server) == 0)
    host, _, port = tiny_server.removeprefix("http://").partition(":")
    body = json.dumps(
        {"model": "coder", "prompt": "hi", "max_tokens": 1200, "stream": True, "ignore_eos": True}
    )
    request = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    )
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request.encode())
        stream = connection.makefile("rb")
        assert any(line.startswith(b"data: ") for line in stream)
        assert metrics.pages_in_use(tiny_server) > 0
    metrics.eventually(lambda: metrics.pages_in_use(tiny_server) == 0)


def test_nothing_compiled_after_warm_up(api, tiny_server):
    api.completions.create(model="coder", prompt=CONTEXT * 7, max_tokens=30, top_p=0.5, n=3)
    compiles = metrics.read(tiny_server)["pshare_compiles_total"]
    assert list(compiles.values()) == [0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base=nowhere"], "nowhere: is not a checkpoint"),
        (["--page_size=0"], "page_size"),
        (["--no_such_key=1"], "no_such_key"),
        (['--models=[{"name": "x", "checkpoint": "base"}]'], "base"),
    ],
)
def test_a_configuration_that_cannot_be_served(tiny_folder, capsys, flags, message):
    assert main([f"--config={write_config(tiny_folder)}", "--port=0", *flags]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("pshare_jax.serve: ")
    assert message in last
