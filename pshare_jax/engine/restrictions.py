"""What the offline engine's callers restrict answers to, as fields of `SamplingParams`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pshare_jax.engine.orchestrator import Orchestrator
from pshare_jax.frontend.chat import Prompt
from pshare_jax.frontend.constraints import asked_grammar, chat_grammar, thoughts_before
from pshare_jax.frontend.model_format import ModelFormat
from pshare_jax.frontend.requests import ChatRequest, GenerationRequest
from pshare_jax.text.bad_words import bad_word_ids
from pshare_jax.text.grammar import GrammarLimits

NAMES = ("response_format", "structured_outputs", "bad_words")


def taken_from(params: dict[str, Any], *more: str) -> dict[str, Any]:
    """Takes out of `params` what is no field of SamplingParams, but asks for restrictions."""
    return {name: params.pop(name) for name in (*NAMES, *more) if name in params}


def completion_fields(engine: Orchestrator, asked: Mapping[str, Any]) -> dict[str, Any]:
    """For a completion.

    Args:
        engine: whose grammars and tokenizer they are for.
        asked: by the names of `NAMES`, as in requests over HTTP.

    Raises:
        RequestError: what cannot be served.
    """
    fields = _bad_words(engine, asked.get("bad_words"))
    body = GenerationRequest(
        model="",
        response_format=asked.get("response_format"),
        structured_outputs=asked.get("structured_outputs"),
    )
    grammar = asked_grammar(body, _limits(engine))
    return fields if grammar is None else {**fields, "grammar": grammar.spec}


def chat_fields(
    engine: Orchestrator,
    asked: Mapping[str, Any],
    style: ModelFormat,
    prompt: Prompt,
    tools: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """For the answer of a chat, forced calls of `tools` included.

    Args:
        engine: whose grammars and tokenizer they are for.
        asked: by the names of `NAMES`, and `tool_choice`, `parallel_tool_calls`.
        style: how the model writes calls and thoughts.
        prompt: the chat.
        tools: functions in OpenAI's form.

    Raises:
        RequestError: what cannot be served.
    """
    fields = _bad_words(engine, asked.get("bad_words"))
    body = ChatRequest(
        model="",
        messages=[],
        tools=[dict(tool) for tool in tools],
        **{name: value for name, value in asked.items() if name != "bad_words"},
    )
    grammar = chat_grammar(body, style, engine.tokenizer, _limits(engine))
    if grammar is None:
        return fields
    thoughts = thoughts_before(grammar, style, prompt, engine.tokenizer)
    return {**fields, "grammar": grammar.spec, "thoughts": thoughts}


def _limits(engine: Orchestrator) -> GrammarLimits:
    return GrammarLimits() if engine.grammars is None else engine.grammars.limits


def _bad_words(engine: Orchestrator, words: Sequence[str] | None) -> dict[str, Any]:
    if not words:
        return {}
    return {"bad_words": bad_word_ids(words, lambda text: engine.tokenizer.encode(text, False))}
