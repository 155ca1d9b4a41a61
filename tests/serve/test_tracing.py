"""Spans of requests, as an exporter in memory gets them."""

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from pshare_jax.errors import ConfigError
from pshare_jax.serve import tracing as tracing_module
from pshare_jax.serve.tracing import Tracing, tracing_of
from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import eventually, running_server

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def traced(tokenizer, exporter):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with running_server(fake_engine(tokenizer)) as client:
        client.server.service.tracing = Tracing(provider)
        yield client


def spans_of(exporter) -> dict:
    """By name, once the request's own, which ends last, has come."""
    eventually(lambda: any(s.name.startswith("POST ") for s in exporter.get_finished_spans()))
    spans = {span.name: span for span in exporter.get_finished_spans()}
    exporter.clear()
    return spans


def post(client, body: dict, path: str = "/v1/completions", **headers: str):
    return client.post(path, {"model": "planner", "prompt": "a private thing", **body}, **headers)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_has_its_stages_below_it(traced, exporter, stream):
    post(traced, {"stream": stream, "max_tokens": 3}, traceparent=f"00-{TRACE}-{PARENT}-01")
    spans = spans_of(exporter)
    request = spans.pop("POST /v1/completions")
    assert request.kind is SpanKind.SERVER
    assert f"{request.context.trace_id:032x}" == TRACE
    assert f"{request.parent.span_id:016x}" == PARENT
    attributes = dict(request.attributes)
    assert attributes.pop("gen_ai.latency.time_to_first_token") > 0
    assert attributes.pop("gen_ai.usage.cache_read.input_tokens") == 0
    assert attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "gen_ai.request.model": "planner",
        "gen_ai.usage.input_tokens": len(traced.engine.submitted[0].prompt_token_ids),
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ("length",),
    }
    seconds = {name: (span.end_time - span.start_time) / 1e9 for name, span in spans.items()}
    assert list(seconds) == ["router", "queue", "prefill", "handoff", "decode"]
    assert seconds["router"] == pytest.approx(0.5, abs=1e-3)
    assert seconds["queue"] == pytest.approx(0.5, abs=1e-3)
    assert dict(spans["router"].attributes) == {
        "pshare.sequence": 0,
        "pshare.prefill_worker": "prefill0",
        "pshare.decode_worker": "decode0",
    }
    assert seconds["prefill"] == pytest.approx(2, abs=1e-3)
    assert seconds["handoff"] == pytest.approx(3, abs=1e-3)
    assert 0 <= seconds["decode"] < 20
    for span in spans.values():
        assert span.parent.span_id == request.context.span_id
    # On the same clock: it decodes while the request is there.
    assert request.start_time <= spans["decode"].end_time <= request.end_time


def test_a_stop_string_has_stages_too(traced, exporter):
    post(traced, {"stop": "hello"})
    assert {"router", "queue", "prefill", "handoff", "decode"} < set(spans_of(exporter))


def test_errors_are_marked_and_nothing_private_is_exported(traced, exporter):
    traced.engine.submit_error = RuntimeError("a bug")
    assert post(traced, {}).status == 500
    span = spans_of(exporter)["POST /v1/completions"]
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["http.response.status_code"] == 500
    assert post(traced, {"prompt": None}, path="/v1/nowhere").status == 404
    span = spans_of(exporter)["POST unknown"]
    assert span.status.status_code is StatusCode.UNSET
    traced.engine.submit_error = None
    post(traced, {})
    exported = "".join(span.to_json() for span in spans_of(exporter).values())
    assert "private" not in exported
    assert "hello" not in exported


def test_probes_are_not_traced(traced, exporter):
    for path in ("/health", "/metrics", "/v1/models"):
        assert traced.get(path).status == 200
    post(traced, {})
    assert [name for name in spans_of(exporter) if name.startswith("GET")] == []


def test_off_unless_configured(tokenizer, monkeypatch):
    assert tracing_of(fake_config().server) is None
    config = fake_config(otlp_traces_endpoint="http://127.0.0.1:1/v1/traces").server
    tracing = tracing_of(config)
    assert tracing is not None
    tracing.close()
    # Without the extra it is an error that says which.
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"needs the extra `otel`"):
        tracing_of(config)


def test_a_collector_that_does_not_answer_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setattr(tracing_module, "_CLOSE_SECONDS", 0.05)
    never, asked = threading.Event(), threading.Event()

    class Stuck(TracerProvider):
        def shutdown(self) -> None:
            asked.set()
            never.wait(60)

    Tracing(Stuck(shutdown_on_exit=False)).close()
    assert asked.is_set()
    never.set()


class Collector(BaseHTTPRequestHandler):
    received: ClassVar[list[tuple[str, str, bytes]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.received.append((self.path, self.headers["Content-Type"], body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_spans_come_to_a_collector(tokenizer):
    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
        config = fake_config(otlp_traces_endpoint=endpoint)
        with running_server(fake_engine(tokenizer, config)) as client:
            assert client.complete().status == 200
        # What was left has been sent when the server ended.
        collector.shutdown()
    [(path, content_type, body)] = Collector.received
    assert (path, content_type) == ("/v1/traces", "application/x-protobuf")
    spans = trace_service_pb2.ExportTraceServiceRequest.FromString(body).resource_spans[0]
    names = [span.name for span in spans.scope_spans[0].spans]
    stages = ["decode", "handoff", "prefill", "queue", "router"]
    assert sorted(names) == ["POST /v1/completions", *stages]
    [service] = [a.value.string_value for a in spans.resource.attributes if a.key == "service.name"]
    assert service == "pshare_jax"
