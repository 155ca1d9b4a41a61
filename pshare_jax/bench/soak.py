"""`bench soak`: mixed traffic for a while, and whether anything of the server grows or goes wrong.

A server of its own (or one that runs already) gets several clients at once: requests whose answers
were recorded while nothing else ran, and must come out the same, sessions over growing contexts,
streams that are dropped, clients that read slowly, several samples at once, and nonsense. Memory,
files, threads, pages, compilations and the event loop's lag are looked at meanwhile; at the end,
when all is idle, everything has to be as it was.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import aiohttp

from pshare_jax.bench.soak_load import Load, Probe, record
from pshare_jax.bench.soak_options import SoakOptions
from pshare_jax.bench.soak_watch import Sample, Watch, judge
from pshare_jax.errors import BenchmarkError
from pshare_jax.serve.process import server_process

Progress = Callable[[int, int], None]

_IDLE_SECONDS = 60.0
_CLOSED_SECONDS = 1.0
# The first part of the time fills caches, free lists and the C library's pools.
WARM_SHARE = 0.25


def run(options: SoakOptions, progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """Starts the server unless there is one, and soaks it.

    Returns:
        The options, `verdicts` (by what was looked at: figures, bound, whether they keep it),
        `requests` by kind and outcome, `faults` (what went wrong, worded) and `samples`.

    Raises:
        BenchmarkError: the server cannot be reached or ended, or does not come to rest.
    """
    with ExitStack() as stack:
        url, pid = options.url, options.pid
        if not url:
            arguments = [f"--config={options.config}", *options.overrides]
            url, process = stack.enter_context(server_process(arguments))
            pid = process.pid
        return asyncio.run(_soak(options, url, pid, progress))


async def _soak(options: SoakOptions, url: str, pid: int, progress: Progress) -> dict[str, Any]:
    timeout = aiohttp.ClientTimeout(total=300)
    # A connection that is kept open is an open file of the server.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:
        watch = Watch(session, pid)
        try:
            models = await watch.models()
            probes = await record(session, models, options)
            before = await _idle(watch)
            load, samples = await _under_load(options, session, models, probes, watch, progress)
            after = await _idle(watch)
            # Those that the load has left waiting, if any, would hang here.
            again = await record(session, models, options)
        except (aiohttp.ClientError, OSError) as error:
            raise BenchmarkError(f"{url}: {type(error).__name__}: {error}") from error
    faults = list(load.faults)
    faults += [
        f"probe {index} differs when alone again"
        for index, (first, second) in enumerate(zip(probes, again, strict=True))
        if first.answer != second.answer
    ]
    return {
        "options": asdict(options),
        "verdicts": judge(before, samples, after, load.compared, faults),
        "requests": {kind: dict(outcomes) for kind, outcomes in load.outcomes.items()},
        "faults": faults,
        "samples": [asdict(sample) for sample in samples],
    }


async def _under_load(
    options: SoakOptions,
    session: aiohttp.ClientSession,
    models: list[str],
    probes: list[Probe],
    watch: Watch,
    progress: Progress,
) -> tuple[Load, list[Sample]]:
    seconds = options.minutes * 60
    begin = time.monotonic()
    end = begin + seconds
    load = Load(session, models, probes, options)
    samples: list[Sample] = []
    async with asyncio.TaskGroup() as group:
        for number in range(options.clients):
            group.create_task(load.client(number, end))
        if options.hot:
            group.create_task(load.hot_loads(end))
        while (now := time.monotonic()) < end:
            sample = await watch.sample(now - begin)
            # Lags and growth while caches fill are not what is asked for.
            if now - begin >= WARM_SHARE * seconds:
                samples.append(sample)
            progress(int(now - begin), int(seconds))
            await asyncio.sleep(min(options.seconds_between_samples, max(0.0, end - now)))
        samples.append(await watch.sample(seconds))
    return load, samples


async def _idle(watch: Watch) -> Sample:
    """The server once nothing runs.

    Raises:
        BenchmarkError: something still runs after a minute.
    """
    deadline = time.monotonic() + _IDLE_SECONDS
    while True:
        sample = await watch.sample(0.0)
        if not sample.running and not sample.pages_used:
            # Connections that were dropped are closed by now, too.
            await asyncio.sleep(_CLOSED_SECONDS)
            return await watch.sample(0.0)
        if time.monotonic() > deadline:
            raise BenchmarkError(
                f"after {_IDLE_SECONDS:g} s without requests {sample.running:g} sequences run and "
                f"{sample.pages_used:g} pages are held"
            )
        await asyncio.sleep(0.2)
