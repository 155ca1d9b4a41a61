"""`bench agents`: sessions of several models over one context, over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp

from pshare_jax.bench.agents_calibrate import session_costs
from pshare_jax.bench.agents_client import CompletionClient
from pshare_jax.bench.agents_compare import against_limit, best_concurrency, compare
from pshare_jax.bench.agents_load import Load, Player, Replies
from pshare_jax.bench.agents_metrics import watched
from pshare_jax.bench.agents_stats import summary
from pshare_jax.bench.agents_targets import (
    ISOLATED,
    LLAMA_CPP,
    SERVERS,
    SHARED,
    VLLM,
    VLLM_LORA,
    Target,
    find_target,
    open_http,
    started,
    tokenizer_folder,
)
from pshare_jax.bench.agents_workload import Workload
from pshare_jax.bench.llama_servers import LlamaServers, running_llama
from pshare_jax.bench.vllm_servers import VllmServers, running_vllm, running_vllm_lora
from pshare_jax.config_files import load_serve_config
from pshare_jax.errors import ConfigError
from pshare_jax.text.tokenizer import Tokenizer

# Each run's text has a seed of its own: warm-ups and calibration count on from here.
_RUNS = 1_000_000


@dataclass(frozen=True)
class AgentsOptions:
    """What is played against what.

    Args:
        title: what the result is called in a report.
        urls: servers that run already: one for all models, or one a model.
        shared: configuration of a server that is started here, whose models share.
        isolated: the same with models that do not: the baseline.
        variants: by name, configurations of further servers whose models share; each is compared
            with every baseline, as `shared` is.
        baselines: by name, configurations of servers that those are compared with; their models
            share, too.
        checkouts: by name, folders of other checkouts of this project; each is a baseline that
            runs `shared` with its own code, in its folder.
        vllm: servers of vLLM that are started too, one a model, and one with adapters: baselines.
        llama_cpp: servers of llama.cpp that are started too, one a model: a baseline.
        server_args: further flags of the servers that are started.
        names: the models' names; empty takes those that the servers list.
        workload: the shape of a session.
        model_counts: numbers of models to sweep over, each with as many calls a session as
            `workload` has; empty is `workload.models` alone.
        concurrency: most live sessions; each number is a run.
        rate: sessions that arrive a second (Poisson); 0 starts one when another ends.
        sessions: counted sessions of a run, at least.
        sessions_per_live: counted sessions for each that is live, where that is more.
        warmup: sessions that are played before each run and not counted.
        rounds: repeats of everything; the order of the targets turns with each.
        seed: of text and arrivals.
        replies: `own` appends generated tokens to the context, for servers that know
            `return_token_ids`; `scripted` appends text of the same length.
        limit: measure prefill and decode apart and give G_max; needs `shared` and `isolated`.
        tokenizer: folder of the models' tokenizer; by default that of the configuration's base.
        extra_body: further fields of every request.
        api_key: bearer token of the servers.
        timeout: seconds that a call may take.
    """

    title: str = "Agents"
    urls: list[str] = field(default_factory=list)
    shared: str | None = None
    isolated: str | None = None
    variants: dict[str, str] = field(default_factory=dict)
    baselines: dict[str, str] = field(default_factory=dict)
    checkouts: dict[str, str] = field(default_factory=dict)
    vllm: VllmServers | None = None
    llama_cpp: LlamaServers | None = None
    server_args: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    workload: Workload = field(default_factory=Workload)
    model_counts: list[int] = field(default_factory=list)
    concurrency: list[int] = field(default_factory=lambda: [4])
    rate: float = 0.0
    sessions: int = 16
    sessions_per_live: int = 0
    warmup: int = 2
    rounds: int = 1
    seed: int = 0
    replies: Replies = "own"
    limit: bool = True
    tokenizer: str | None = None
    extra_body: dict[str, Any] = field(default_factory=dict)
    api_key: str | None = None
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if not (self.urls or self.configs or self.vllm or self.llama_cpp):
            raise ConfigError(
                "name servers: --urls, --shared, --isolated, --variants, --vllm.python or "
                "--llama_cpp.binary"
            )
        if self.vllm and not (self.vllm.each or self.vllm.adapters):
            raise ConfigError("vllm: nothing is started with `each` false and no `adapters`")
        if self.llama_cpp and self.replies == "own":
            raise ConfigError(
                "llama_cpp: its replies have no token ids; give --replies=scripted, for all servers"
            )
        seen = {SHARED, ISOLATED, SERVERS, VLLM, VLLM_LORA, LLAMA_CPP}
        for option in ("variants", "baselines", "checkouts"):
            named = getattr(self, option)
            if taken := seen & named.keys():
                raise ConfigError(f"{option}: the name {min(taken)!r} has another meaning already")
            seen |= named.keys()
        if self.checkouts and self.shared is None:
            raise ConfigError("checkouts: they run the configuration of --shared; name one")
        for name, folder in self.checkouts.items():
            if not Path(folder, "pshare_jax").is_dir():
                raise ConfigError(f"checkouts.{name}: there is no checkout in {folder}")
        for name in ("sessions", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("sessions_per_live", "warmup", "rate", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: must not be negative, got {getattr(self, name)}")
        if self.timeout <= 0:
            raise ConfigError(f"timeout: must be above 0, got {self.timeout}")
        if not self.concurrency or min(self.concurrency) < 1:
            raise ConfigError(f"concurrency: must be numbers from 1 up, got {self.concurrency}")

    @property
    def configs(self) -> dict[str, str]:
        """Configuration files of the servers to start, the baseline first."""
        former = dict.fromkeys(self.checkouts, self.shared)
        named = {
            ISOLATED: self.isolated,
            **former,
            **self.baselines,
            **self.variants,
            SHARED: self.shared,
        }
        return {name: config for name, config in named.items() if config is not None}

    def counted_sessions(self, concurrency: int) -> int:
        """Sessions of a run with so many live at once."""
        return max(self.sessions, self.sessions_per_live * concurrency)

    def workloads(self) -> list[Workload]:
        """One for each number of models, all with the same number of calls a session.

        Raises:
            ConfigError: the calls cannot be divided among so many models.
        """
        calls = self.workload.models * self.workload.turns
        workloads = []
        for count in self.model_counts or [self.workload.models]:
            if count < 1 or calls % count:
                raise ConfigError(
                    f"model_counts: {calls} calls a session (workload.models * workload.turns) "
                    f"cannot be divided among {count} models"
                )
            workloads.append(replace(self.workload, models=count, turns=calls // count))
        return workloads


@dataclass(frozen=True)
class _Point:
    round: int
    workload: Workload
    concurrency: int
    seed: int


Progress = Callable[[int, int], None]


def run(options: AgentsOptions, progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """Plays everything; `progress` gets the calls made so far and those of all runs.

    Raises:
        ConfigError: options that do not fit each other or the servers.
        BenchmarkError: a call failed or was not what was asked for. Nothing is counted then.
        EngineDeadError: a server could not be started.
    """
    workloads = options.workloads()
    configs = options.configs
    tokenizer = Tokenizer.load(tokenizer_folder(options.tokenizer, configs))

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    with ExitStack() as stack:
        servers = {SERVERS: options.urls} if options.urls else {}
        servers.update(_peers(options, max(workload.models for workload in workloads), stack))
        addresses = stack.enter_context(started(configs, options.server_args, options.checkouts))
        servers.update({name: [url] for name, url in addresses.items()})
        bench = _Bench(options, workloads, servers, encode, progress)
        return asyncio.run(bench.run())


def _peers(options: AgentsOptions, models: int, stack: ExitStack) -> dict[str, list[str]]:
    """Starts the other projects' servers, for as long as `stack` lasts; gives their URLs."""
    servers = {}
    if options.vllm and options.vllm.each:
        servers[VLLM] = stack.enter_context(running_vllm(options.vllm, models))
    if options.vllm and options.vllm.adapters:
        servers[VLLM_LORA] = [stack.enter_context(running_vllm_lora(options.vllm))]
    if options.llama_cpp:
        servers[LLAMA_CPP] = stack.enter_context(running_llama(options.llama_cpp, models))
    return servers


class _Bench:
    def __init__(
        self,
        options: AgentsOptions,
        workloads: Sequence[Workload],
        servers: dict[str, list[str]],
        encode: Callable[[str], list[int]],
        progress: Progress,
    ):
        self._options = options
        self._workloads = workloads
        self._servers = servers
        self._encode = encode
        self._progress = progress
        self._done = 0
        self._total = len(servers) * sum(
            (options.counted_sessions(point.concurrency) + options.warmup)
            * len(point.workload.calls())
            for point in self._points()
        )

    async def run(self) -> dict[str, Any]:
        options = self._options
        async with open_http(options.timeout, options.api_key) as http:
            most = max(workload.models for workload in self._workloads)
            targets = [
                await find_target(http, name, urls, options.names, most)
                for name, urls in self._servers.items()
            ]
            runs = []
            for point in self._points():
                turn = point.round % len(targets)
                runs += [await self._run(http, t, point) for t in targets[turn:] + targets[:turn]]
            names = [target.name for target in targets]
            sharing = [name for name in names if name in {SHARED, *options.variants}]
            comparisons = [
                row
                for name in sharing or names[-1:]
                for baseline in names
                if baseline not in {name, *sharing}
                for row in compare(runs, name, baseline)
            ]
            return {
                "options": {**asdict(options), "api_key": None},
                "configs": _settings(options),
                "targets": [asdict(t) | {"version": await _version(http, t)} for t in targets],
                "runs": runs,
                "comparisons": comparisons,
                "limits": await self._limits(http, targets, runs, comparisons),
            }

    def _points(self) -> Iterator[_Point]:
        number = self._options.seed * _RUNS
        for turn in range(self._options.rounds):
            for workload in self._workloads:
                for concurrency in self._options.concurrency:
                    yield _Point(turn, workload, concurrency, number)
                    number += 2

    async def _run(
        self, http: aiohttp.ClientSession, target: Target, point: _Point
    ) -> dict[str, Any]:
        options = self._options
        client = CompletionClient(
            http,
            options.extra_body,
            want_ids=options.replies == "own",
            apart=target.name == ISOLATED,
        )
        player = Player(
            client,
            target.endpoints,
            point.workload,
            self._encode,
            options.replies,
            self._called,
        )
        if options.warmup:
            await player.play(Load(options.warmup, point.concurrency, 0.0, point.seed + 1))
        sessions = options.counted_sessions(point.concurrency)
        load = Load(sessions, point.concurrency, options.rate, point.seed)
        async with watched(http, target.urls[: point.workload.models]) as metrics:
            played = await player.play(load)
        return {
            "target": target.name,
            "models": point.workload.models,
            "concurrency": point.concurrency,
            "round": point.round,
            "seed": point.seed,
            **summary(played),
            "server": metrics.as_dict(),
        }

    async def _limits(
        self,
        http: aiohttp.ClientSession,
        targets: Sequence[Target],
        runs: Sequence[dict[str, Any]],
        comparisons: Sequence[dict[str, Any]],
    ) -> list[dict[str, Any]]:
        shared = next((target for target in targets if target.name == SHARED), None)
        if not self._options.limit or shared is None:
            return []
        rows = []
        for index, workload in enumerate(self._workloads):
            for row in comparisons:
                if (row["target"], row["baseline"]) != (SHARED, ISOLATED):
                    continue
                if row["models"] != workload.models:
                    continue
                concurrency = best_concurrency(runs, SHARED, workload.models)
                seed = self._options.seed * _RUNS + _RUNS // 2 + index
                load = Load(concurrency, concurrency, 0.0, seed)
                extra = self._options.extra_body
                costs = await session_costs(http, shared, workload, self._encode, load, extra)
                rows.append(against_limit(row, workload, costs))
        return rows

    def _called(self) -> None:
        self._done += 1
        self._progress(self._done, self._total)


def _settings(options: AgentsOptions) -> dict[str, Any]:
    """What the servers that are started here are told, defaults included, but for the HTTP side."""
    configs = {
        name: asdict(load_serve_config(file, *options.server_args))
        for name, file in options.configs.items()
    }
    return {name: {**config, "server": None} for name, config in configs.items()}


async def _version(http: aiohttp.ClientSession, target: Target) -> Any:
    """What the first server says of itself at `/version`; None where it says nothing."""
    try:
        async with http.get(f"{target.urls[0]}/version") as response:
            return await response.json() if response.status == 200 else None
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return None
