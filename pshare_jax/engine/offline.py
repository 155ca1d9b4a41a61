"""The engine for Python users, without a server."""

from __future__ import annotations

import dataclasses
import itertools
import queue
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from pshare_jax.config import ServeConfig
from pshare_jax.config_files import load_serve_config
from pshare_jax.core.requests import Request, RequestOutput, SamplingParams
from pshare_jax.engine import restrictions
from pshare_jax.engine.completion import ChatAnswer, Collector, Completion, ToolCall
from pshare_jax.engine.orchestrator import Orchestrator
from pshare_jax.errors import QueueFullError, RequestError, UnknownModelError
from pshare_jax.frontend.answers import joined
from pshare_jax.frontend.chat import (
    TemplateOptions,
    chat_messages,
    chat_prompt,
    parameter_schemas,
)
from pshare_jax.frontend.model_format import ModelFormat, ModelFormats, check_tool_parser
from pshare_jax.frontend.params import Limits

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class Engine:
    """Generates with several models over one shared prefill, in this process.

    >>> with Engine.from_config("configs/serve/smollm2-135m.yaml") as engine:
    ...     engine.generate(model="base", prompts=["The sky is"], max_tokens=8)
    """

    def __init__(self, orchestrator: Orchestrator):
        self._orchestrator = orchestrator
        self._formats = ModelFormats(lambda name: orchestrator.tokenizer_of(name).chat_template)
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
            params: fields of SamplingParams, on top of `sampling`; and, as over HTTP, OpenAI's
                `response_format`, vLLM's `structured_outputs` and `bad_words` (texts).

        Raises:
            RequestError: a prompt or parameter that can never be served.
            EngineDeadError: the engine has failed.
        """
        asked = restrictions.taken_from(params)
        params |= restrictions.completion_fields(self._orchestrator, asked)
        return self._generate(
            model, prompts, stop, sampling, cache_salt, on_completion, params, shown=()
        )

    def _generate(
        self,
        model: str,
        prompts: Prompt | Sequence[Prompt],
        stop: Sequence[str],
        sampling: SamplingParams | None,
        cache_salt: str,
        on_completion: Callable[[int, Completion], None] | None,
        params: dict[str, Any],
        shown: tuple[str, ...],
    ) -> list[Completion]:
        """As `generate`; `shown` are special tokens that are part of the text."""
        many = _as_prompts(prompts)
        params = {"temperature": 0.0, **params} if sampling is None else params
        sampling = msgspec.structs.replace(sampling or SamplingParams(), **params)
        events: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        requests = [
            Request(f"offline-{next(self._ids)}", model, self._encode(prompt), sampling, cache_salt)
            for prompt in many
        ]
        tokenizer = self._orchestrator.tokenizer
        least = sampling.min_tokens
        collectors = {r.id: Collector(tokenizer, stop, shown, least) for r in requests}
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
        self,
        model: str,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        stop: Sequence[str] = (),
        cache_salt: str = "",
        template_options: TemplateOptions | None = None,
        **params: Any,
    ) -> ChatAnswer:
        """Answers a conversation; prompt and answer are written and read as the server does.

        Args:
            model: name of a served model.
            messages: in OpenAI's form: `{"role": ..., "content": ...}`, calls of tools and their
                results included.
            tools: functions that the model may call, in OpenAI's form.
            stop: strings that end the answer.
            cache_salt: conversations of different salts share no KV.
            template_options: how messages become a prompt.
            params: fields of SamplingParams; greedy unless they say otherwise, `max_tokens`
                defaults to what fits; and, as over HTTP, `response_format`, `structured_outputs`,
                `bad_words`, `tool_choice` and `parallel_tool_calls`.

        Raises:
            RequestError: messages, tools or parameters that can never be served.
            EngineDeadError: the engine has failed.
        """
        engine = self._orchestrator
        limits = Limits(engine.model_config.vocab_size, engine.config.max_model_len)
        style = self.format_of(model)
        options = template_options or TemplateOptions()
        options = dataclasses.replace(options, tool_prompt=style.tool_prompt)
        conversation = chat_messages(messages)
        prompt = chat_prompt(engine.tokenizer_of(model), limits, conversation, tools, options)
        asked = restrictions.taken_from(params, "tool_choice", "parallel_tool_calls")
        params |= restrictions.chat_fields(engine, asked, style, prompt, tools)
        params = {"max_tokens": max(limits.max_model_len - len(prompt.token_ids), 1), **params}
        [completion] = self._generate(
            model, [prompt.token_ids], stop, None, cache_salt, None, params, style.markers
        )
        schemas = parameter_schemas(tools)
        one_call = asked.get("parallel_tool_calls") is False
        reader = style.reader(schemas, prompt.in_reasoning, one_call)
        parts = reader.push(completion.text) + reader.finish()
        reasoning, content, calls = joined(parts)
        return ChatAnswer(
            **vars(completion),
            content=content,
            reasoning=reasoning,
            tool_calls=[ToolCall(name, arguments) for name, arguments in calls],
        )

    def format_of(self, model: str) -> ModelFormat:
        """How a model writes calls and thoughts.

        Raises:
            UnknownModelError: no such model is served.
        """
        info = self._orchestrator.models.get(model)
        if info is None:
            raise UnknownModelError(f"model {model!r} is not served", "model")
        return self._formats.of(info)

    def load_module(
        self,
        name: str,
        folder: str | Path,
        *,
        replace: bool = False,
        tool_parser: str | None = None,
    ) -> None:
        """Serves the decode module in `folder` under `name` from now on.

        There must be room for it: `decode.max_loras`, `decode.max_full`. With `replace` it takes
        the place of a module of that name. `tool_parser` is as in `config.ModelEntry`; None: as
        before under that name, or as configured for it.

        Raises:
            RequestError, CheckpointError, ConfigError: see `Orchestrator.load_module`.
        """
        check_tool_parser(tool_parser)
        self._orchestrator.load_module(name, folder, replace=replace, tool_parser=tool_parser)

    def unload_module(self, name: str) -> None:
        """Serves a decode module no more; what runs goes on to its end.

        Raises:
            RequestError: see `Orchestrator.unload_module`.
        """
        self._orchestrator.unload_module(name)

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
