"""An engine in this process answers: the server's way, without HTTP."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import msgspec

from pshare_jax.config import ServeConfig
from pshare_jax.engine.offline import Completion, Engine
from pshare_jax.errors import EvaluationError, RequestError, UnknownModelError
from pshare_jax.evals.backend import Answer, OnAnswer, Sampling, chat_request
from pshare_jax.evals.items import Item
from pshare_jax.frontend.chat import TemplateOptions, chat_prompt
from pshare_jax.frontend.params import (
    Limits,
    output_params,
    resolve_max_tokens,
    sampling_defaults,
    sampling_params,
)
from pshare_jax.frontend.requests import ChatRequest


class OfflineBackend:
    """Answers with a model of `engine`, which belongs to the caller.

    Args:
        engine: a started engine.
        model: the name of a model that it serves.

    Raises:
        UnknownModelError: it serves no such model.
    """

    def __init__(self, engine: Engine, model: str):
        served = engine.orchestrator.models
        if model not in served:
            raise UnknownModelError(f"no model {model!r} is served; there are {', '.join(served)}")
        self._engine = engine
        self._model = model

    def describe(self) -> dict[str, Any]:
        """The engine's configuration, and of the model what the server says about it."""
        config: ServeConfig = self._engine.orchestrator.config
        info = self._engine.orchestrator.models[self._model]
        shown = {name: getattr(info, name) for name in ("parent", "sharing", "kind", "tail")}
        fields = dataclasses.asdict(config)
        fields.pop("server")
        return {"backend": "offline", "config": fields, "model_info": shown}

    def answer(self, items: Sequence[Item], sampling: Sampling, on_answer: OnAnswer) -> None:
        """Answers all items in one batch; see `Backend`.

        The requests are those that `server.ServerBackend` sends, and become prompts and parameters
        by the server's own code, so that answers do not depend on the way.
        """
        engine = self._engine.orchestrator
        limits = Limits(engine.model_config.vocab_size, engine.config.max_model_len)
        bodies = [self._body(item, sampling) for item in items]
        # All bodies differ in messages and tools only.
        stop = output_params(bodies[0]).stop
        defaults = None
        if engine.config.server.generation_config == "auto":
            defaults = sampling_defaults(engine.tokenizer.generation_config)
        params = sampling_params(bodies[0], limits, sampling.max_tokens, None, defaults)
        prompts = self._prompts(items, bodies, limits)

        def done(index: int, completion: Completion) -> None:
            on_answer(
                index,
                Answer(
                    completion.text,
                    str(completion.finish_reason),
                    completion.usage.prompt_tokens,
                    len(completion.token_ids),
                ),
            )

        self._engine.generate(
            self._model,
            prompts,
            stop=stop,
            sampling=params,
            on_completion=done,
        )

    def _body(self, item: Item, sampling: Sampling) -> ChatRequest:
        try:
            return msgspec.convert(chat_request(self._model, item, sampling), ChatRequest)
        except msgspec.ValidationError as error:
            raise EvaluationError(f"item {item.id}: {error}") from error

    def _prompts(
        self, items: Sequence[Item], bodies: Sequence[ChatRequest], limits: Limits
    ) -> list[tuple[int, ...]]:
        prompts: list[tuple[int, ...]] = []
        tokenizer = self._engine.orchestrator.tokenizer_of(self._model)
        options = TemplateOptions(tool_prompt=self._engine.format_of(self._model).tool_prompt)
        for item, body in zip(items, bodies, strict=True):
            try:
                prompt = chat_prompt(tokenizer, limits, body.messages, body.tools, options)
                count = len(prompt.token_ids)
                resolve_max_tokens(body.max_tokens, None, count, limits, "messages")
            except RequestError as error:
                raise EvaluationError(f"item {item.id}: {error}") from error
            prompts.append(prompt.token_ids)
        return prompts
