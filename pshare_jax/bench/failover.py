"""`bench failover`: what streams notice when the decode worker that generates for them is killed.

A cluster of one prefill and two decode workers behind one frontend is started. Streams ask without
a pause; then one decode worker's process is killed, which the launcher starts again. Each stream
has a model of its own, so the workers' metrics say, just before, whose streams they have. At the
end each request is asked alone, and every answer must have been the same.
"""

from __future__ import annotations

import asyncio
import math
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from pshare_jax.bench.agents_stats import percentiles
from pshare_jax.bench.agents_targets import tokenizer_folder
from pshare_jax.bench.agents_workload import TextSource
from pshare_jax.bench.failover_cluster import Cluster, placed, running_cluster, settings_of
from pshare_jax.bench.failover_streams import Answer, Stream, gap_around, tokens_between
from pshare_jax.errors import BenchmarkError, ConfigError
from pshare_jax.text.tokenizer import Tokenizer

BEFORE, AWAY, AFTER = "before", "while it was away", "after"
_SLACK_SECONDS = 0.25
"""Tokens of a worker that was killed are with the client after this, if they ever are."""
_LOOK_SECONDS = 0.05
_STAGGER_SECONDS = 0.4
_LEFT_TOKENS = 8
"""Streams count whose request has at least as many to come when the worker is killed."""
_SHARE = 0.75
"""So many of the streams must be in the middle of a request at that moment."""
_PLACE_SECONDS = 30.0
"""That it may take until they are."""
_ERRORS_SHOWN = 5
_NEW_SALT = "asked alone"


@dataclass(frozen=True)
class FailoverOptions:
    """What is measured.

    Args:
        config: the serving configuration; its models are listed again until each stream has one.
        serve: further flags of the processes; by default pools that hold some twenty such streams,
            and no larger batches than eight make, so that a worker starts sooner.
        streams: live ones.
        prompt: tokens of each stream's prompt, of real text.
        reply: tokens of each answer. Odd streams are sampled with a seed, the others are greedy.
        warm_seconds: before anything is counted.
        window_seconds: over which tokens are counted, before and after.
        ready_seconds: that the cluster may take to start.
        back_seconds: that the killed worker may take to be back.
        timeout: seconds that a request may take.
        seed: of the prompts.
    """

    config: str = "configs/bench/lora.yaml"
    serve: list[str] = field(
        default_factory=lambda: [
            "--prefill.num_pages=257",
            "--decode.num_pages=257",
            "--decode.batch_buckets=[1,2,4,8]",
        ]
    )
    streams: int = 8
    prompt: int = 512
    reply: int = 96
    warm_seconds: float = 10.0
    window_seconds: float = 10.0
    ready_seconds: float = 150.0
    back_seconds: float = 90.0
    timeout: float = 120.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.streams < 2:
            raise ConfigError(f"streams: must be at least 2, got {self.streams}")
        if self.reply <= _LEFT_TOKENS:
            raise ConfigError(f"reply: must be more than {_LEFT_TOKENS} tokens, got {self.reply}")
        for name in ("prompt", "window_seconds", "ready_seconds", "back_seconds", "timeout"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}: must be above 0, got {getattr(self, name)}")
        if self.warm_seconds < 0:
            raise ConfigError(f"warm_seconds: must not be negative, got {self.warm_seconds}")


@dataclass(frozen=True)
class Kill:
    """A worker's death.

    Attributes:
        worker: its name.
        at: when, in seconds of `time.perf_counter`.
        back: when another process had taken its place and was linked.
        requests: by stream that was in the middle of one, its number and the worker that had it.
    """

    worker: str
    at: float
    back: float
    requests: dict[int, tuple[int, str]]


def run(options: FailoverOptions) -> dict[str, Any]:
    """Measures it once.

    Returns:
        `{"options", "killed": name, "away_seconds", "gaps": {"its streams", "other streams":
        {"streams", "p50", "p95", "worst"}}, "tokens_per_s": by time, "requests", "failed",
        "errors": a few of them, "compared": with the answer alone, "different"}`. Times in
        seconds; a side without streams has no percentiles.

    Raises:
        BenchmarkError: the cluster did not start, the worker was not back in time, no stream could
            be placed, or a request that was asked alone failed.
        ConfigError: the configuration cannot be served so.
    """
    settings = settings_of(Path(options.config), options.streams)
    tokenizer = Tokenizer.load(tokenizer_folder(None, {"config": options.config}))
    with tempfile.TemporaryDirectory(prefix="pshare-bench-failover-") as folder:
        config = Path(folder) / "serve.yaml"
        config.write_text(yaml.safe_dump(settings))
        with running_cluster(config, options.serve, options.ready_seconds) as cluster:
            bodies = _bodies(options, [model["name"] for model in settings["models"]], tokenizer)
            return asyncio.run(_measure(options, cluster, bodies))


def failed(result: dict[str, Any]) -> bool:
    """Whether a request failed, or was answered otherwise than alone."""
    return bool(result["failed"] or result["different"])


def _bodies(
    options: FailoverOptions, models: Sequence[str], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    return [
        {
            "model": model,
            "prompt": TextSource(encode, options.seed, number).take(options.prompt),
            "max_tokens": options.reply,
            "temperature": 1.0 * (number % 2),
            "seed": number,
        }
        for number, model in enumerate(models)
    ]


async def _measure(
    options: FailoverOptions, cluster: Cluster, bodies: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    timeout = aiohttp.ClientTimeout(total=options.timeout)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(cluster.url, timeout=timeout, connector=connector) as http:
        streams = [Stream(http, body) for body in bodies]
        try:
            # With one decode worker linked before the other all streams would begin there.
            await _until(
                lambda: cluster.is_whole(http), options.ready_seconds, "linked to all workers"
            )
            async with _playing(streams):
                await asyncio.sleep(options.warm_seconds + options.window_seconds)
                kill = await _kill(options, cluster, http, streams)
                await asyncio.sleep(options.window_seconds)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise BenchmarkError(
                f"a process does not say how it is: {type(error).__name__}: {error}"
            ) from error
        alone = [await stream.alone(_NEW_SALT) for stream in streams]
    return {
        "options": asdict(options),
        **figures([stream.answers for stream in streams], alone, kill, options.window_seconds),
    }


async def _until(holds: Callable[[], Awaitable[bool]], seconds: float, what: str) -> None:
    """Waits until it holds.

    Raises:
        BenchmarkError: it does not within `seconds`.
    """
    end = time.perf_counter() + seconds
    while not await holds():
        if time.perf_counter() > end:
            raise BenchmarkError(f"waited {seconds:.0f} s, in vain, until {what}")
        await asyncio.sleep(_LOOK_SECONDS)


@asynccontextmanager
async def _playing(streams: Sequence[Stream]) -> AsyncIterator[None]:
    """Has all streams ask while the block lasts, and end what they have asked for then.

    They begin one after the other, so that they are not all at the same token.
    """
    stop = asyncio.Event()
    tasks = [
        asyncio.create_task(stream.play(number * _STAGGER_SECONDS, stop))
        for number, stream in enumerate(streams)
    ]
    try:
        yield
        stop.set()
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _kill(
    options: FailoverOptions,
    cluster: Cluster,
    http: aiohttp.ClientSession,
    streams: Sequence[Stream],
) -> Kill:
    """Kills the decode worker that has most streams, and waits until it is back."""
    end = time.perf_counter() + _PLACE_SECONDS
    while True:
        requests = await _placed(options, cluster, http, streams)
        if len(requests) >= math.ceil(_SHARE * len(streams)):
            break
        if time.perf_counter() > end:
            errors = [answer.error for stream in streams for answer in stream.answers]
            raise BenchmarkError(
                f"never were {_SHARE:.0%} of the streams in the middle of a request that one "
                f"decode worker had; give longer answers (--reply={options.reply}). Requests that "
                f"failed: {next(filter(None, errors), 'none')}"
            )
        await asyncio.sleep(_LOOK_SECONDS)
    workers = [worker for _, worker in requests.values()]
    worker = max(sorted(set(workers)), key=workers.count)
    pid = cluster.kill(worker)
    at = time.perf_counter()
    await _until(
        lambda: cluster.is_back(http, worker, pid), options.back_seconds, f"{worker} is back"
    )
    return Kill(worker, at, time.perf_counter(), requests)


async def _placed(
    options: FailoverOptions,
    cluster: Cluster,
    http: aiohttp.ClientSession,
    streams: Sequence[Stream],
) -> dict[int, tuple[int, str]]:
    """By stream that is in the middle of a request: its number, and the worker that has it.

    Only those that were in the middle of the same request before and after the workers were asked:
    with one request a model, what these say can be of no other.
    """
    before = [stream.now for stream in streams]
    found = placed(await cluster.held(http), [stream.model for stream in streams])
    requests = {}
    for index, (stream, (number, tokens)) in enumerate(zip(streams, before, strict=True)):
        number_now, tokens_now = stream.now
        same = tokens > 0 and number_now == number
        if same and tokens_now <= options.reply - _LEFT_TOKENS and stream.model in found:
            requests[index] = number - 1, found[stream.model]
    return requests


def figures(
    answers: Sequence[Sequence[Answer]], alone: Sequence[Answer], kill: Kill, window: float
) -> dict[str, Any]:
    """What the streams' answers come to.

    Args:
        answers: of each stream, in order.
        alone: what each stream's request was answered alone.
        kill: who was killed, and when.
        window: seconds over which tokens are counted, before and after.
    """
    gaps: dict[bool, list[float]] = {True: [], False: []}
    for stream, (number, worker) in kill.requests.items():
        times = [when for when, _ in answers[stream][number].arrivals]
        gap = gap_around(times, kill.at, _SLACK_SECONDS)
        if gap is not None:
            gaps[worker == kill.worker].append(gap)
    everything = [answer for stream in answers for answer in stream]
    spans = {
        BEFORE: (kill.at - window, kill.at),
        AWAY: (kill.at, kill.back),
        AFTER: (kill.back, kill.back + window),
    }
    errors = [answer.error for answer in everything if answer.error]
    compared = [
        answer.same_as(reference)
        for stream, reference in zip(answers, alone, strict=True)
        for answer in stream
        if not answer.error
    ]
    return {
        "killed": kill.worker,
        "away_seconds": kill.back - kill.at,
        "gaps": {"its streams": _spread(gaps[True]), "other streams": _spread(gaps[False])},
        "tokens_per_s": {
            name: tokens_between(everything, start, end) / (end - start)
            for name, (start, end) in spans.items()
        },
        "requests": len(everything),
        "failed": len(errors),
        "errors": errors[:_ERRORS_SHOWN],
        "compared": len(compared),
        "different": compared.count(False),
    }


def _spread(gaps: Sequence[float]) -> dict[str, Any]:
    found = percentiles(gaps)
    if found is None:
        return {"streams": 0}
    return {"streams": len(gaps), "p50": found["p50"], "p95": found["p95"], "worst": max(gaps)}


def lines(result: dict[str, Any]) -> list[str]:
    """The result as lines of text."""
    shown = [f"{result['killed']} was killed, and back after {result['away_seconds']:.1f} s:"]
    for side, gap in result["gaps"].items():
        seconds = (
            f"p50 {gap['p50']:.2f} s, p95 {gap['p95']:.2f} s, worst {gap['worst']:.2f} s"
            if gap["streams"]
            else "none"
        )
        shown.append(f"  longest wait for a token around it, {gap['streams']} {side}: {seconds}")
    for name, rate in result["tokens_per_s"].items():
        shown.append(f"  tokens/s {name}: {rate:.1f}")
    shown.append(
        f"  {result['failed']} of {result['requests']} requests failed, {result['different']} of "
        f"{result['compared']} answers were other than alone"
    )
    return [*shown, *(f"  {error}" for error in result["errors"])]
