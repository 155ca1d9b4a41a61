"""Prometheus metrics: vLLM's names where vLLM has one, `pshare_` for the rest.

Counters and gauges are read off the engine when somebody asks; latencies and lengths are observed
here, where the client's clock runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pshare_jax.core.requests import FinishReason, RequestOutput, RequestTimes
from pshare_jax.core.stats import EngineStats, TokenSource
from pshare_jax.serve.role_metrics import role_metrics
from pshare_jax.serve.store_metrics import store_metrics
from pshare_jax.serve.transfer_metrics import transfer_metrics

_SOURCES: tuple[TokenSource, ...] = ("computed", "same_model", "other_model")
_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)
_LAG_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)

# (name, help, value of one model): what the engine counts for each model.
_ModelMetric = tuple[str, str, Callable[[EngineStats, str], float]]
_COUNTERS: tuple[_ModelMetric, ...] = (
    (
        "vllm:prefix_cache_queries",
        "Prompt tokens looked up in a prefix index.",
        lambda stats, model: sum(stats.prefill_tokens.get((model, s), 0) for s in _SOURCES),
    ),
    (
        "vllm:prefix_cache_hits",
        "Prompt tokens found in a prefix index.",
        lambda stats, model: sum(stats.prefill_tokens.get((model, s), 0) for s in _SOURCES[1:]),
    ),
    (
        "vllm:prompt_tokens",
        "Prompt tokens of admitted requests.",
        lambda stats, model: stats.prompt_tokens.get(model, 0),
    ),
    (
        "vllm:generation_tokens",
        "Generated tokens.",
        lambda stats, model: stats.generation_tokens.get(model, 0),
    ),
    (
        "pshare_forced_tokens",
        "Generated tokens for which a grammar left no choice, and no step was taken.",
        lambda stats, model: stats.forced_tokens.get(model, 0),
    ),
    (
        "vllm:num_preemptions",
        "Sequences that lost their pages and were replayed.",
        lambda stats, model: stats.preemptions.get(model, 0),
    ),
    (
        "pshare_reply_prefill_tokens",
        "Tokens of replies that were covered before anybody asked, by who wrote the reply.",
        lambda stats, model: stats.ahead_tokens.get(model, 0),
    ),
    (
        "pshare_reply_prefill_used_tokens",
        "Of these, tokens that a prompt began with, by whom it asked; each counts once.",
        lambda stats, model: stats.foreseen_tokens.get(model, 0),
    ),
    (
        "pshare_handoff_bytes",
        "Bytes of KV moved from prefill pools to decode pools.",
        lambda stats, model: stats.handoff_bytes.get(model, 0),
    ),
    (
        "pshare_handoff_pages",
        "Pages moved from prefill pools to decode pools.",
        lambda stats, model: stats.handoff_pages.get(model, 0),
    ),
)
_GAUGES: tuple[_ModelMetric, ...] = (
    (
        "vllm:num_requests_running",
        "Sequences being generated.",
        lambda stats, model: stats.running.get(model, 0),
    ),
    (
        "vllm:num_requests_waiting",
        "Sequences waiting for their turn.",
        lambda stats, model: stats.waiting.get(model, 0),
    ),
    (
        "vllm:kv_cache_usage_perc",
        "Share of the decode pools' pages that running sequences hold; 1 is all.",
        lambda stats, _: _decode_pool_usage(stats),
    ),
)


def _decode_pool_usage(stats: EngineStats) -> float:
    pools = [pool for name, pool in stats.pools.items() if name.startswith("decode")]
    total = sum(pool.total for pool in pools)
    return sum(pool.used for pool in pools) / total if total else 0.0


def _widened_bytes() -> int:
    """Of the kernels, in a process that has loaded them: a frontend does not import JAX for it."""
    library = sys.modules.get("pshare_jax.kernels.native.library")
    return library.widened_bytes() if library is not None else 0


class _EngineCollector(Collector):
    def __init__(self, models: Sequence[str], stats: Callable[[], EngineStats]):
        self._models = models
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        for name, text, value in _COUNTERS:
            yield self._by_model(
                CounterMetricFamily(name, text, labels=["model_name"]), value, stats
            )
        for name, text, value in _GAUGES:
            yield self._by_model(GaugeMetricFamily(name, text, labels=["model_name"]), value, stats)
        yield self._prefill_tokens(stats)
        yield CounterMetricFamily(
            "pshare_compiles", "Compilations after warm-up.", value=stats.compiles
        )
        yield self._pages(stats)
        yield self._busy_seconds(stats)
        yield from transfer_metrics(stats)
        yield self._borrowed(stats)
        yield self._decode_pages(stats)
        yield self._failed_transfers(stats)
        yield from store_metrics(stats)
        yield from role_metrics(stats)

    def _by_model(
        self,
        family: CounterMetricFamily | GaugeMetricFamily,
        value: Callable[[EngineStats, str], float],
        stats: EngineStats,
    ) -> Metric:
        for model in self._models:
            family.add_metric([model], value(stats, model))
        return family

    def _prefill_tokens(self, stats: EngineStats) -> Metric:
        family = CounterMetricFamily(
            "pshare_prefill_tokens",
            "Prompt tokens, by who computed their KV.",
            labels=["model_name", "source"],
        )
        for model in self._models:
            for source in _SOURCES:
                family.add_metric([model, source], stats.prefill_tokens.get((model, source), 0))
        return family

    def _pages(self, stats: EngineStats) -> Metric:
        family = GaugeMetricFamily(
            "pshare_pages",
            "Pages of a pool; the shared ones are among the used.",
            labels=["pool", "state"],
        )
        for name, pool in stats.pools.items():
            for state in ("free", "used", "shared", "cached"):
                family.add_metric([name, state], getattr(pool, state))
        return family

    def _busy_seconds(self, stats: EngineStats) -> Metric:
        family = CounterMetricFamily(
            "pshare_busy_seconds", "Time that an engine's thread has worked.", labels=["engine"]
        )
        for name, seconds in stats.busy_seconds.items():
            family.add_metric([name], seconds)
        return family

    def _failed_transfers(self, stats: EngineStats) -> Metric:
        family = CounterMetricFamily(
            "pshare_failed_transfers",
            "Transfers of pages that did not come, or were not what was asked for.",
            labels=["engine"],
        )
        for name, count in stats.failed_transfers.items():
            family.add_metric([name], count)
        return family

    def _borrowed(self, stats: EngineStats) -> Metric:
        family = CounterMetricFamily(
            "pshare_borrowed_tokens",
            "Prompt tokens whose KV a prefill worker got from another worker.",
            labels=["engine"],
        )
        for name, count in stats.borrowed_tokens.items():
            family.add_metric([name], count)
        return family

    def _decode_pages(self, stats: EngineStats) -> Metric:
        family = CounterMetricFamily(
            "pshare_decode_pages",
            "KV pages that decode attention read, and those saved by sharing prefixes.",
            labels=["engine", "state"],
        )
        for (engine, state), pages in stats.decode_pages.items():
            family.add_metric([engine, state], pages)
        return family


class Metrics:
    """Everything that `/metrics` shows.

    Args:
        models: names of the served models; each has its series from the start.
        stats: takes a snapshot of the engine.
        others: collectors of what is counted elsewhere.
    """

    def __init__(self, models: Iterable[str], stats: Callable[[], EngineStats], *others: Collector):
        self._models: list[str] = []
        self._registry = CollectorRegistry()
        for collector in (_EngineCollector(self._models, stats), *others):
            self._registry.register(collector)
        histogram = self._histogram
        self.first_token = histogram("time_to_first_token_seconds", "Arrival to token 1.", _SECONDS)
        self.inter_token = histogram(
            "inter_token_latency_seconds", "Time between tokens.", _TOKEN_SECONDS
        )
        self.per_token = histogram(
            "request_time_per_output_token_seconds",
            "Mean time between the tokens of a request.",
            _TOKEN_SECONDS,
        )
        self.end_to_end = histogram("e2e_request_latency_seconds", "Arrival to end.", _SECONDS)
        self.queue = histogram("request_queue_time_seconds", "Arrival to prefill.", _SECONDS)
        self.prefill = histogram("request_prefill_time_seconds", "Prefill to handoff.", _SECONDS)
        self.decode = histogram("request_decode_time_seconds", "First slot to end.", _SECONDS)
        self.prompt_len = histogram("request_prompt_tokens", "Prompt lengths.", _TOKENS)
        self.completion_len = histogram("request_generation_tokens", "Answer lengths.", _TOKENS)
        self.finished = Counter(
            "vllm:request_success",
            "Ended sequences, as their clients saw them.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self.loop_lag = Histogram(
            "pshare_event_loop_lag_seconds",
            "How late the event loop woke up, looked at 50 times a second.",
            buckets=_LAG_SECONDS,
            registry=self._registry,
        )
        self.own_loop_lag = Histogram(
            "pshare_event_loop_own_lag_seconds",
            "The part of its lag that the event loop's own work made, in processor time.",
            buckets=_LAG_SECONDS,
            registry=self._registry,
        )
        self.max_loop_lag = Gauge(
            "pshare_event_loop_max_lag_seconds",
            "The greatest of the last minute or two.",
            registry=self._registry,
        )
        Gauge(
            "pshare_widened_kv_bytes",
            "Memory in which the C++ kernels widen KV of 8 bits, beside the pools.",
            registry=self._registry,
        ).set_function(_widened_bytes)
        for name in models:
            self.add_model(name)

    def add_model(self, name: str) -> None:
        """Has the series of one more model, unless they are there."""
        if name in self._models:
            return
        self._models.append(name)
        for reason in FinishReason:
            self.finished.labels(name, reason.value)
        for family in self._histograms():
            family.labels(name)

    def register(self, collector: Collector) -> None:
        """Shows what `collector` collects, too."""
        self._registry.register(collector)

    def timer(self, model: str, arrival: float, prompt_len: int) -> SequenceTimer:
        """Observes one sequence; `arrival` is in seconds of `time.monotonic`."""
        return SequenceTimer(self, model, arrival, prompt_len)

    def stages(self, model: str, times: RequestTimes, end: float) -> None:
        """Observes how long a sequence that was served was in the stages of the engine."""
        if times.prefill is not None:
            self.queue.labels(model).observe(max(0.0, times.prefill - times.submitted))
            if times.covered is not None:
                self.prefill.labels(model).observe(max(0.0, times.covered - times.prefill))
        if times.started is not None:
            self.decode.labels(model).observe(max(0.0, end - times.started))

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(
            f"vllm:{name}", text, ["model_name"], buckets=buckets, registry=self._registry
        )

    def _histograms(self) -> Iterator[Histogram]:
        yield from (
            self.first_token,
            self.inter_token,
            self.per_token,
            self.end_to_end,
            self.queue,
            self.prefill,
            self.decode,
            self.prompt_len,
            self.completion_len,
        )


class SequenceTimer:
    """Times one sequence. A device call's tokens share the time since the one before.

    Attributes:
        stages: once it has ended: what it came to when, and when it ended.
    """

    def __init__(self, metrics: Metrics, model: str, arrival: float, prompt_len: int):
        self._metrics = metrics
        self._model = model
        self._arrival = arrival
        self._prompt_len = prompt_len
        self._inter_token = metrics.inter_token.labels(model)
        self._first: float | None = None
        self._last = arrival
        self._times: RequestTimes | None = None
        self.stages: tuple[RequestTimes, float] | None = None

    @property
    def first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self._first is None else self._first - self._arrival

    def tokens(self, output: RequestOutput, now: float) -> None:
        """Observes an event, which happened at `now`."""
        self._times = output.times or self._times
        count = len(output.token_ids)
        if not count:
            return
        if self._first is None:
            self._first = now
            self._metrics.first_token.labels(self._model).observe(now - self._arrival)
            # The clock cannot tell apart tokens that came with the first.
            count = 0
        for _ in range(count):
            self._inter_token.observe((now - self._last) / count)
        self._last = now

    def end(self, reason: FinishReason, completion_tokens: int, now: float) -> None:
        """Observes the end: lengths, unless the engine failed, and latencies, if it was served."""
        metrics, model = self._metrics, self._model
        if self._times is not None:
            self.stages = (self._times, now)
        metrics.finished.labels(model, reason.value).inc()
        if reason is FinishReason.ERROR:
            return
        metrics.prompt_len.labels(model).observe(self._prompt_len)
        metrics.completion_len.labels(model).observe(completion_tokens)
        if reason is FinishReason.ABORT:
            return
        metrics.end_to_end.labels(model).observe(now - self._arrival)
        if self._times is not None:
            metrics.stages(model, self._times, now)
        if self._first is not None and completion_tokens > 1:
            mean = (self._last - self._first) / (completion_tokens - 1)
            metrics.per_token.labels(model).observe(mean)
