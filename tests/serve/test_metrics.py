from prometheus_client.parser import text_string_to_metric_families

from tests.serve.server import eventually
from tests.serve.test_completions import script


def test_every_promised_name_has_a_series_for_each_model_from_the_start(client):
    answer = client.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    families = {f.name: f for f in text_string_to_metric_families(answer.body.decode())}
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_queries",
        "vllm:prefix_cache_hits",
        "vllm:prompt_tokens",
        "vllm:generation_tokens",
        "vllm:request_success",
        "vllm:num_preemptions",
        "vllm:time_to_first_token_seconds",
        "vllm:inter_token_latency_seconds",
        "vllm:request_time_per_output_token_seconds",
        "vllm:e2e_request_latency_seconds",
        "vllm:request_prompt_tokens",
        "vllm:request_generation_tokens",
        "pshare_prefill_tokens",
        "pshare_handoff_bytes",
        "pshare_handoff_pages",
        "pshare_forced_tokens",
    ):
        models = {sample.labels["model_name"] for sample in families[name].samples}
        assert models == {"planner", "coder", "team/critic"}, name
    assert client.metric("pshare_compiles_total") == 0


def test_counters_follow_the_engine(client):
    prompt = list(range(3, 25))
    client.complete(prompt)
    client.complete(prompt, model="coder")
    client.complete(prompt, model="coder", max_tokens=2)
    metric = client.metric
    for model, source, tokens in [
        ("planner", "computed", 21),
        ("planner", "other_model", 0),
        ("coder", "computed", 2),
        ("coder", "other_model", 40),
        ("coder", "same_model", 0),
    ]:
        assert metric("pshare_prefill_tokens_total", model_name=model, source=source) == tokens
    assert metric("vllm:prefix_cache_queries_total", model_name="coder") == 42
    assert metric("vllm:prefix_cache_hits_total", model_name="coder") == 40
    assert metric("vllm:prompt_tokens_total", model_name="coder") == 44
    answer_len = len(client.engine.tokenizer.encode("hello world")) + 1
    assert metric("vllm:generation_tokens_total", model_name="coder") == answer_len + 2
    assert metric("vllm:num_preemptions_total", model_name="planner") == 3
    assert metric("vllm:num_requests_waiting", model_name="coder") == 2
    assert metric("pshare_handoff_bytes_total", model_name="planner") == 210


def test_busy_seconds(client):
    assert client.metric("pshare_busy_seconds_total", engine="prefill0") == 1.5
    assert client.metric("pshare_busy_seconds_total", engine="decode0") == 2.5


def test_pages_read_and_saved(client):
    for state, pages in [("read", 8), ("saved", 5)]:
        name = "pshare_decode_pages_total"
        assert client.metric(name, engine="decode0", state=state) == pages


def test_transfers_by_their_way(client):
    name = "pshare_transfers_total"
    assert client.metric(name, engine="decode0", transport="http") == 3


def test_coded_transfers(client):
    name = "pshare_transfer_bytes_total"
    labels = {"engine": "decode0", "transport": "http", "codec": "planes"}
    assert client.metric(name, kind="raw", **labels) == 1400
    assert client.metric(name, kind="wire", **labels) == 1000
    assert client.metric("pshare_transfers_miscoded_total", engine="decode0", reason="record") == 2
    assert client.metric("pshare_unasked_offers_total", engine="decode0", outcome="used") == 4


def test_pools(client):
    for pool, state, pages in [("prefill0", "cached", 7), ("decode0", "used", 15)]:
        assert client.metric("pshare_pages", pool=pool, state=state) == pages
    assert client.metric("pshare_pages", pool="decode0", state="shared") == 4
    assert client.metric("pshare_pages", pool="decode1", state="free") == 40
    assert client.metric("vllm:kv_cache_usage_perc", model_name="planner") == 0.2


def test_ends_are_counted_as_the_client_saw_them(client):
    def ends() -> dict[str, float]:
        return {
            reason: client.metric(
                "vllm:request_success_total", model_name="planner", finished_reason=reason
            )
            for reason in ("stop", "length", "abort", "error")
        }

    assert ends() == {"stop": 0, "length": 0, "abort": 0, "error": 0}
    client.complete()
    client.complete(max_tokens=1, n=2)
    # The engine sees an abort, the client a stop string.
    client.complete(stop="o w")
    assert ends() == {"stop": 2, "length": 2, "abort": 0, "error": 0}
    client.engine.gate.clear()
    body = {"model": "planner", "prompt": "x"}
    with client.raw_request("/v1/completions", body):
        eventually(lambda: client.engine.running_ids != [])
        assert client.metric("vllm:num_requests_running", model_name="planner") == 1
    eventually(lambda: client.engine.running_ids == [])
    eventually(lambda: ends() == {"stop": 2, "length": 2, "abort": 1, "error": 0})


def test_histograms_observe_each_token_once(client):
    script(client.engine, "x", end=False)
    for tokens_per_event in (1, 4):
        client.engine.tokens_per_event = tokens_per_event
        client.complete("hello there", max_tokens=12)
    metric, labels = client.metric, {"model_name": "planner"}
    assert metric("vllm:time_to_first_token_seconds_count", **labels) == 2
    # One token at a time: 11 gaps; four at a time: the 8 that came after the first event.
    assert metric("vllm:inter_token_latency_seconds_count", **labels) == 19
    assert metric("vllm:request_time_per_output_token_seconds_count", **labels) == 2
    assert metric("vllm:e2e_request_latency_seconds_count", **labels) == 2
    assert metric("vllm:request_generation_tokens_sum", **labels) == 24
    prompt_len = len(client.engine.tokenizer.encode("hello there"))
    assert metric("vllm:request_prompt_tokens_sum", **labels) == 2 * prompt_len
    assert (
        0
        < metric("vllm:time_to_first_token_seconds_sum", **labels)
        <= metric("vllm:e2e_request_latency_seconds_sum", **labels)
    )


def test_what_routers_read_of_adapters_and_of_the_cache(client):
    client.engine.models["coder"].__dict__["kind"] = "lora"
    client.engine.models["planner"].__dict__["kind"] = "lora"
    client.engine.gate.clear()
    with client.raw_request("/v1/completions", {"model": "planner", "prompt": "x"}):
        eventually(lambda: client.engine.running_ids != [])
        assert client.metric(
            "vllm:lora_requests_info",
            running_lora_adapters="planner",
            waiting_lora_adapters="coder",
            max_lora="2",
        )
    client.engine.gate.set()
    assert (
        client.metric(
            "vllm:cache_config_info",
            block_size="32",
            num_gpu_blocks="100",
            num_prefill_blocks="99",
            cache_dtype="auto",
            enable_prefix_caching="True",
        )
        == 1
    )


def test_the_stages_of_the_engine_are_timed(client):
    client.complete()
    for stage, seconds in (("queue", 1), ("prefill", 2)):
        name = f"vllm:request_{stage}_time_seconds"
        assert client.metric(f"{name}_count", model_name="planner") == 1
        assert abs(client.metric(f"{name}_sum", model_name="planner") - seconds) < 1e-6
    assert client.metric("vllm:request_decode_time_seconds_count", model_name="planner") == 1
