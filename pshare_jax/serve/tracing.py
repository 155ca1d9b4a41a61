"""Traces of requests by OpenTelemetry: where the time of each went. Comes with the extra `otel`.

A request has a span from its arrival to the end of its answer, below that of the caller if it sends
a `traceparent`; below it each sequence has `router`, `queue`, `prefill`, `handoff` and `decode`, by
what the dispatcher heard when. Prompts and answers are in none of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.typedefs import Handler

from pshare_jax import __version__
from pshare_jax.config import ServerConfig
from pshare_jax.core.requests import RequestTimes
from pshare_jax.errors import ConfigError
from pshare_jax.serve.access_log import REPORT

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

_CLOSE_SECONDS = 5.0
_ATTRIBUTES = {
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "ttft_seconds": "gen_ai.latency.time_to_first_token",
    "finish_reasons": "gen_ai.response.finish_reasons",
}


def tracing_of(config: ServerConfig) -> Tracing | None:
    """What sends traces to the configured endpoint; None without one.

    Raises:
        ConfigError: the extra `otel` is not installed.
    """
    if not config.otlp_traces_endpoint:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigError(
            "server.otlp_traces_endpoint needs the extra `otel`: pip install 'pshare_jax[otel]'"
        ) from None
    resource = Resource.create({"service.name": "pshare_jax", "service.version": __version__})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    # It sends from a thread of its own, and drops spans rather than wait for the collector.
    exporter = OTLPSpanExporter(endpoint=config.otlp_traces_endpoint)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider)


class Tracing:
    """Makes the spans of requests.

    Args:
        provider: where they go; shut down by `close`.
    """

    def __init__(self, provider: TracerProvider):
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("pshare_jax.serve", __version__)
        self._propagator = TraceContextTextMapPropagator()
        # Spans are in wall-clock time, and the engine's in that of a clock that never jumps.
        self._offset = time.time_ns() - time.monotonic_ns()

    async def trace(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Handles a request within a span, if it generates or is asked to."""
        from opentelemetry.trace import SpanKind, StatusCode

        if request.method != "POST":
            return await handler(request)
        route = request.match_info.route.resource
        name = route.canonical.rstrip("/") if route is not None else "unknown"
        span = self._tracer.start_span(
            f"POST {name}",
            context=self._propagator.extract(request.headers),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": "POST", "http.route": name},
        )
        status = 499  # as proxies call a client that has gone
        try:
            response = await handler(request)
            status = response.status
            return response
        finally:
            self._describe(span, request)
            span.set_attribute("http.response.status_code", status)
            if status >= 500:
                span.set_status(StatusCode.ERROR)
            span.end()

    def close(self) -> None:
        """Sends what is left, for at most 5 seconds: the collector may not answer."""
        sending = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        sending.start()
        sending.join(_CLOSE_SECONDS)

    def _describe(self, span: Span, request: web.Request) -> None:
        from opentelemetry.trace import set_span_in_context

        report = request.get(REPORT)
        if report is None:
            return
        facts = report.facts()
        for name, attribute in _ATTRIBUTES.items():
            if facts.get(name) is not None:
                span.set_attribute(attribute, facts[name])
        context = set_span_in_context(span)
        for index, (times, end) in enumerate(report.times()):
            for stage, start, stop in _stages(times, end):
                child = self._tracer.start_span(
                    stage,
                    context=context,
                    start_time=self._wall(start),
                    attributes={"pshare.sequence": index, **_attributes(stage, times)},
                )
                child.end(self._wall(stop))

    def _wall(self, seconds: float) -> int:
        return int(seconds * 1e9) + self._offset


def _attributes(stage: str, times: RequestTimes) -> dict[str, str]:
    if stage != "router":
        return {}
    return {
        "pshare.prefill_worker": times.prefill_worker,
        "pshare.decode_worker": times.decode_worker,
    }


def _stages(times: RequestTimes, end: float) -> Iterator[tuple[str, float, float]]:
    """The stages that a sequence has come to, with their begin and end."""
    marks: list[tuple[str, float | None]] = [
        ("router", None if times.routed is None else times.submitted),
        ("queue", times.submitted if times.routed is None else times.routed),
        ("prefill", times.prefill),
        ("handoff", times.covered),
        ("decode", times.started),
    ]
    reached = [(stage, start) for stage, start in marks if start is not None]
    ends = [start for _, start in reached[1:]] + [end]
    for (stage, start), stop in zip(reached, ends, strict=True):
        yield stage, start, max(start, stop)
