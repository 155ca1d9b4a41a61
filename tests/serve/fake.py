"""An engine without a model: scripted tokens from a thread, and an honest prefix index."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pshare_jax.config import ModelEntry, ServeConfig, ServerConfig
from pshare_jax.core.pages.sharing_map import MapContext, MapPage, SharingMap
from pshare_jax.core.requests import (
    FinishReason,
    PromptUsage,
    Request,
    RequestOutput,
    RequestTimes,
    TokenLogprobs,
)
from pshare_jax.core.stats import EngineStats, PoolStats
from pshare_jax.errors import EngineDeadError, QueueFullError, UnknownModelError
from pshare_jax.models.config import ModelConfig
from pshare_jax.text.grammar import GrammarCompiler
from pshare_jax.text.tokenizer import Tokenizer

MODELS = {"planner": "shared", "coder": "shared", "team/critic": "isolated"}
PAGE_SIZE = 4
TAIL = 1


@dataclass(frozen=True)
class FakeModelInfo:
    name: str
    sharing: str
    parent: str = "base"
    kind: str = "identity"
    tail: int = TAIL
    created: int = 1_700_000_000
    fingerprint: str = ""
    tool_parser: str = "auto"
    reasoning: str = "auto"


@dataclass
class Running:
    request: Request
    sink: Callable[[RequestOutput], None]
    script: list[int]
    usage: PromptUsage
    times: RequestTimes
    sent: int = 0


@dataclass
class FakeOrchestrator:
    """Generates `script(request)` for each request, the last token over and over if need be.

    `gate` lets tokens through while it is set; `start_gate` lets `start` return. Tokens come
    `tokens_per_event` at a time. `log_usage` keeps what was told about each prompt.
    """

    config: ServeConfig
    tokenizer: Tokenizer
    script: Callable[[Request], list[int]]
    tokens_per_event: int = 1
    gate: threading.Event = field(default_factory=threading.Event)
    start_gate: threading.Event = field(default_factory=threading.Event)
    start_error: Exception | None = None
    submit_error: Exception | None = None
    ready: bool = False
    lacking: str = ""
    dead: str | None = None
    failed_workers: dict[str, str] = field(default_factory=dict)
    submitted: list[Request] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    completed: list[str] = field(default_factory=list)
    loaded: list[tuple[str, Path, bool]] = field(default_factory=list)
    load_error: Exception | None = None
    tokenizers: dict[str, Tokenizer] = field(default_factory=dict)

    def __post_init__(self):
        self.model_config = ModelConfig("llama", self.tokenizer.vocab_size + 8, 8, 8, 1, 1, 1, 8)
        entries = {name: ModelEntry(name) for name in MODELS}
        entries |= {entry.name: entry for entry in self.config.models}
        self.models = {
            name: FakeModelInfo(
                name,
                sharing,
                tool_parser=entries[name].tool_parser,
                reasoning=entries[name].reasoning,
            )
            for name, sharing in MODELS.items()
        }
        self.grammars = GrammarCompiler(self.tokenizer) if self.tokenizer.eos_token_ids else None
        self._lock = threading.Condition()
        self._running: dict[str, Running] = {}
        self._index: dict[tuple, str] = {}
        self._counts: dict[str, Counter] = {
            name: Counter() for name in ("prefill", "prompt", "generation", "finished", "bytes")
        }
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.gate.set()
        self.start_gate.set()

    def tokenizer_of(self, model: str) -> Tokenizer:
        return self.tokenizers.get(model, self.tokenizer)

    def start(self) -> None:
        self.start_gate.wait()
        if self.start_error is not None:
            raise self.start_error
        self._thread.start()
        self.ready = True

    def stop(self) -> None:
        self.gate.set()
        with self._lock:
            self._stopped = True
            self._lock.notify_all()
            self._end_all("the engine was stopped")
        if self._thread.ident is not None:
            self._thread.join()

    def fail(self, reason: str) -> None:
        with self._lock:
            self.dead = reason
            self._end_all(reason)

    def submit(self, request: Request, sink: Callable[[RequestOutput], None]) -> None:
        with self._lock:
            if self.dead is not None:
                raise EngineDeadError(self.dead)
            if self.submit_error is not None:
                raise self.submit_error
            if request.model not in self.models:
                raise UnknownModelError(f"no model {request.model}")
            if len(self._running) >= self.config.max_queue:
                raise QueueFullError("the queue is full", retry_after=1.5)
            assert request.id not in self._running
            self.submitted.append(request)
            usage = self._prefill(request)
            self._running[request.id] = Running(
                request, sink, self.script(request), usage, _times(time.monotonic())
            )
            self._lock.notify_all()

    def abort(self, request_id: str, *, complete: bool = False) -> None:
        with self._lock:
            self.completed += [request_id] * complete
            self.aborted.append(request_id)
            if running := self._running.pop(request_id, None):
                self._finish(running, RequestOutput(request_id, finish_reason=FinishReason.ABORT))

    def stats(self) -> EngineStats:
        with self._lock:
            running = Counter(run.request.model for run in self._running.values())
            counts = self._counts
            return EngineStats(
                prefill_tokens=dict(counts["prefill"]),
                ahead_tokens={"coder": 7},
                foreseen_tokens={"planner": 5},
                prompt_tokens=dict(counts["prompt"]),
                generation_tokens=dict(counts["generation"]),
                handoff_bytes=dict(counts["bytes"]),
                handoff_pages={},
                preemptions={"planner": 3},
                compiles=0,
                finished=dict(counts["finished"]),
                running=dict(running),
                waiting={"coder": 2},
                decode_pages={("decode0", "read"): 8, ("decode0", "saved"): 5},
                failed_transfers={"decode0": 0},
                transfers={("decode0", "http"): 3},
                transfer_bytes={
                    ("decode0", "http", "planes", "raw"): 1400,
                    ("decode0", "http", "planes", "wire"): 1000,
                },
                miscoded={("decode0", "record"): 2},
                unasked={("decode0", "made"): 5, ("decode0", "used"): 4},
                busy_seconds={"prefill0": 1.5, "decode0": 2.5},
                pools={
                    "prefill0": PoolStats(total=99, free=90, used=2, shared=1, cached=7),
                    "decode0": PoolStats(total=50, free=30, used=15, shared=4, cached=5),
                    "decode1": PoolStats(total=50, free=40, used=5, shared=0, cached=5),
                },
            )

    def load_module(
        self,
        name: str,
        folder: Path,
        *,
        replace: bool = False,
        tool_parser: str | None = None,
        reasoning: str | None = None,
    ) -> FakeModelInfo:
        if self.load_error is not None:
            raise self.load_error
        self.loaded.append((name, folder, replace))
        before = self.models.get(name) or FakeModelInfo(name, "shared")
        self.models[name] = FakeModelInfo(
            name,
            "shared",
            kind="lora",
            tool_parser=tool_parser or before.tool_parser,
            reasoning=reasoning or before.reasoning,
        )
        return self.models[name]

    def unload_module(self, name: str) -> None:
        if name not in self.models:
            raise UnknownModelError(f"model {name!r} is not served", "lora_name")
        del self.models[name]

    def sharing_map(self) -> SharingMap:
        """A page for each model that has been asked, which it computed, and reads while it runs."""
        with self._lock:
            running = {run.request.model for run in self._running.values()}
            asked = sorted({request.model for request in self.submitted})
        pages = [
            MapPage(PAGE_SIZE, [(name, PAGE_SIZE)], [name] if name in running else [], ["p"], False)
            for name in asked
        ]
        return SharingMap(PAGE_SIZE, [MapContext("c", "", 0, pages)] if pages else [])

    @property
    def running_ids(self) -> list[str]:
        with self._lock:
            return list(self._running)

    def _prefill(self, request: Request) -> PromptUsage:
        """Whole pages before the tail are found by the hash chain of what comes before them."""
        covered = request.prompt_token_ids[:-TAIL]
        isolated = self.models[request.model].sharing == "isolated"
        namespace = request.model if isolated else "base"
        sources: Counter = Counter()
        hit = True
        for end in range(PAGE_SIZE, len(covered) + 1, PAGE_SIZE):
            key = (namespace, request.cache_salt, covered[:end])
            hit = hit and key in self._index
            if not hit:
                self._index[key] = request.model
                continue
            source = "same_model" if self._index[key] == request.model else "other_model"
            sources[source] += PAGE_SIZE
        cached = sources.total()
        sources["computed"] = len(covered) - cached
        for source, tokens in sources.items():
            self._counts["prefill"][request.model, source] += tokens
        self._counts["prompt"][request.model] += len(request.prompt_token_ids)
        self._counts["bytes"][request.model] += 10 * sources["computed"]
        return PromptUsage(
            prompt_tokens=len(request.prompt_token_ids),
            computed_tokens=sources["computed"],
            cached_tokens=cached,
            shared_tokens=sources["other_model"],
        )

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._running and not self._stopped:
                    self._lock.wait()
                if self._stopped:
                    return
            self.gate.wait()
            with self._lock:
                for running in list(self._running.values()):
                    self._step(running)
            time.sleep(0)

    def _step(self, running: Running) -> None:
        request, params = running.request, running.request.params
        if params.prompt_logprobs is not None and not running.sent:
            scores = self._logprobs(list(request.prompt_token_ids[1:]), params.prompt_logprobs)
            running.sink(RequestOutput(request.id, prompt_logprobs=(None, *scores)))
        if params.max_tokens == 0:
            del self._running[request.id]
            end = RequestOutput(request.id, usage=running.usage, finish_reason=FinishReason.LENGTH)
            self._finish(running, end)
            return
        stops = set(params.stop_token_ids)
        if not params.ignore_eos:
            stops.update(self.tokenizer_of(running.request.model).eos_token_ids)
        token_ids, reason, stop_token = [], None, None
        while reason is None and len(token_ids) < self.tokens_per_event:
            token_id = running.script[min(running.sent, len(running.script) - 1)]
            token_ids.append(token_id)
            running.sent += 1
            if token_id in stops:
                reason, stop_token = FinishReason.STOP, token_id
            elif running.sent >= params.max_tokens:
                reason = FinishReason.LENGTH
        self._counts["generation"][request.model] += len(token_ids)
        output = RequestOutput(
            request.id,
            token_ids=tuple(token_ids),
            logprobs=self._logprobs(token_ids, params.logprobs),
            usage=running.usage if running.sent == len(token_ids) else None,
            finish_reason=reason,
            stop_token=stop_token,
            times=running.times,
        )
        if reason is None:
            running.sink(output)
        else:
            del self._running[request.id]
            self._finish(running, output)

    def _logprobs(self, token_ids: list[int], count: int | None) -> tuple[TokenLogprobs, ...]:
        """The chosen token is the second most likely; the least likely one is impossible."""
        if count is None:
            return ()
        scores = [-0.25, -0.5, *(-float(rank) for rank in range(1, 18)), float("-inf")]
        return tuple(
            TokenLogprobs(
                -0.5,
                tuple(
                    ((token_id + (1, 0, *range(2, 20))[rank]) % 400, scores[rank])
                    for rank in range(count)
                ),
            )
            for token_id in token_ids
        )

    def _finish(self, running: Running, output: RequestOutput) -> None:
        self._counts["finished"][running.request.model, output.finish_reason] += 1
        running.sink(output)

    def _end_all(self, reason: str) -> None:
        for running in list(self._running.values()):
            self._finish(
                running,
                RequestOutput(running.request.id, finish_reason=FinishReason.ERROR, error=reason),
            )
        self._running.clear()


def _times(now: float) -> RequestTimes:
    """A router of 0.5 s, a queue of 0.5 s, a prefill of 2 s and a handoff of 3 s.

    Though nothing takes its time here.
    """
    return RequestTimes(now - 6, now - 5, now - 3, now, now - 5.5, "prefill0", "decode0")


def fake_config(max_model_len: int = 256, max_queue: int = 64, **server) -> ServeConfig:
    return ServeConfig(
        base="fake",
        models=[ModelEntry(name) for name in MODELS],
        max_model_len=max_model_len,
        max_queue=max_queue,
        server=ServerConfig(**{"port": 0, **server}),
    )


def fake_engine(tokenizer: Tokenizer, config: ServeConfig | None = None, text: str = "hello world"):
    """Answers `text` and the end token, whatever it is asked."""
    answer = [*tokenizer.encode(text), tokenizer.eos_token_ids[0]]
    return FakeOrchestrator(config or fake_config(), tokenizer, lambda request: list(answer))
