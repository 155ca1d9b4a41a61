"""The engine for Python users, without a server."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from pshare_jax.config import ServeConfig, load_serve_config
from pshare_jax.core.messages import (
    FinishReason,
    PromptUsage,
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from pshare_jax.engine.orchestrator import Orchestrator
from pshare_jax.errors import EngineDeadError, QueueFullError, RequestError
from pshare_jax.text.detokenizer import StopMatcher

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Completion:
    """What a model generated for one prompt.

    `token_ids` include the end token, if one ended it; `text` contains neither it nor the stop
    string. `logprobs` has an entry for each token when they were asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: PromptUsage
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class _Collector:
    """Gathers one request's events and looks for stop strings."""

    def __init__(self, engine: Orchestrator, stop: Sequence[str]):
        self._detokenizer = engine.tokenizer.detokenizer()
        self._matcher = StopMatcher(stop)
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._usage: PromptUsage | None = None
        self._reason: FinishReason | None = None

    @property
    def done(self) -> bool:
        return self._reason is not None

    def add(self, event: RequestOutput) -> None:
        if self.done:
            return
        if event.error is not None:
            raise EngineDeadError(event.error)
        self._usage = event.usage or self._usage
        for i, token in enumerate(event.token_ids):
            self._tokens.append(token)
            self._logprobs += event.logprobs[i : i + 1]
            self._text.append(self._matcher.push(self._detokenizer.push(token)))
            if self._matcher.matched is not None:
                self._reason = FinishReason.STOP
                return
        if event.finish_reason is not None:
            self._text.append(self._matcher.push(self._detokenizer.finish()))
            self._text.append(self._matcher.finish())
            self._reason = event.finish_reason

    def completion(self) -> Completion:
        assert self._reason is not None
        assert self._usage is not None
        return Completion(
            "".join(self._text), self._tokens, self._reason, self._usage, self._logprobs
        )


class Engine:
    """Generates with several models over one shared prefill, in this process.

    >>> with Engine.from_config("configs/serve/smollm2-135m.yaml") as engine:
    ...     engine.generate(model="base", prompts=["The sky is"], max_tokens=8)
    """

    def __init__(self, orchestrator: Orchestrator):
        self._orchestrator = orchestrator
        self._ids = itertools.count()
        orchestrator.start()

    @classmethod
    def from_config(cls, config: ServeConfig | str | Path, *overrides: str) -> Engine:
        """Loads and compiles what a serving configuration names.

        Args:
            config: a configuration, or the path of a YAML file.
            overrides: `--a.b=c` flags on top of the file.

        Raises:
            ConfigError, CheckpointError, CertificateError: see `Orchestrator.from_config`.
        """
        if not isinstance(config, ServeConfig):
            config = load_serve_config(config, *overrides)
        return cls(Orchestrator.from_config(config))

    @property
    def orchestrator(self) -> Orchestrator:
        """The engine itself: models, tokenizer, statistics."""
        return self._orchestrator

    def generate(
        self,
        model: str,
        prompts: Prompt | Sequence[Prompt],
        *,
        stop: Sequence[str] = (),
        sampling: SamplingParams | None = None,
        cache_salt: str = "",
        on_completion: Callable[[int, Completion], None] | None = None,
        **params: Any,
    ) -> list[Completion]:
        """Completes prompts, all of them at once.

        Args:
            model: name of a served model.
            prompts: texts, or token id lists; one, or several.
            stop: strings that end a completion.
            sampling: how to sample; greedy when neither this nor `params` says otherwise.
            cache_salt: prompts of different salts share no KV.
            on_completion: called with the index of a prompt and its completion as soon as it is
                there, in the caller's thread; the next one waits until it returns.
            params: fields of SamplingParams, on top of `sampling`.

        Raises:
            RequestError: a prompt or parameter that can never be served.
            EngineDeadError: the engine has failed.
        """
        many = _as_prompts(prompts)
        params = {"temperature": 0.0, **params} if sampling is None else params
        sampling = msgspec.structs.replace(sampling or SamplingParams(), **params)
        events: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        requests = [
            Request(f"offline-{next(self._ids)}", model, self._encode(prompt), sampling, cache_salt)
            for prompt in many
        ]
        collectors = {request.id: _Collector(self._orchestrator, stop) for request in requests}
        indices = {request.id: index for index, request in enumerate(requests)}
        waiting = list(reversed(requests))
        running = 0
        try:
            while waiting or running:
                running += self._submit(waiting, events, running)
                event = events.get()
                collector = collectors[event.request_id]
                was_done = collector.done
                collector.add(event)
                if collector.done and not was_done:
                    if event.finish_reason is None:
                        self._orchestrator.abort(event.request_id, complete=True)
                    if on_completion is not None:
                        on_completion(indices[event.request_id], collector.completion())
                running -= event.finish_reason is not None
        except BaseException:
            for request in requests:
                self._orchestrator.abort(request.id)
            raise
        return [collectors[request.id].completion() for request in requests]

    def chat(
        self, model: str, messages: Sequence[Message], *, stop: Sequence[str] = (), **params: Any
    ) -> Completion:
        """Answers a conversation, rendered with the base's chat template.

        Args:
            model: name of a served model.
            messages: `{"role": ..., "content": ...}` dicts.
            stop: strings that end the answer.
            params: fields of SamplingParams; `max_tokens` defaults to what fits.
        """
        text = self._orchestrator.tokenizer.apply_chat_template(messages)
        prompt = self._orchestrator.tokenizer.encode(text, add_special_tokens=False)
        room = max(self._orchestrator.config.max_model_len - len(prompt), 1)
        params = {"max_tokens": room, **params}
        return self.generate(model, [prompt], stop=stop, **params)[0]

    def close(self) -> None:
        """Ends the engine's threads."""
        self._orchestrator.stop()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self._orchestrator.tokenizer.encode(prompt))
        return tuple(prompt)

    def _submit(
        self, waiting: list[Request], events: queue.SimpleQueue[RequestOutput], running: int
    ) -> int:
        """Submits as many of `waiting` (last first) as the engine's queue takes."""
        submitted = 0
        while waiting:
            try:
                self._orchestrator.submit(waiting[-1], events.put)
            except QueueFullError:
                if running + submitted == 0:
                    raise
                break
            waiting.pop()
            submitted += 1
        return submitted


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts from one prompt or several."""
    if isinstance(prompts, str):
        return [prompts]
    items: list[Any] = list(prompts)
    if not items:
        raise RequestError("prompts is empty; it needs at least one", "prompts")
    return [items] if isinstance(items[0], int) else items
