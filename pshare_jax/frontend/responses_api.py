"""OpenAI's Responses API: what a request may hold, and the chat that it is.

Nothing is stored: a request carries the whole conversation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from pshare_jax.errors import RequestError
from pshare_jax.frontend.requests import (
    ChatMessage,
    ChatRequest,
    Ignored,
    SessionHints,
    StreamOptions,
    ToolCall,
    ToolFunction,
    Whole,
    make_whole,
)
from pshare_jax.plain_data import is_list, is_mapping, is_object

_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


class ResponsesRequest(SessionHints, kw_only=True):
    """`POST /v1/responses`."""

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: Whole | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    text: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    prompt: Any = None
    stream_options: StreamOptions | None = None
    top_logprobs: Whole | None = None
    cache_salt: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning: Ignored = None
    include: Ignored = None
    store: Ignored = None
    truncation: Ignored = None
    user: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    max_tool_calls: Ignored = None
    client_metadata: Ignored = None

    def __post_init__(self) -> None:
        make_whole(self, "max_output_tokens")
        make_whole(self, "top_logprobs")


def as_chat(body: ResponsesRequest) -> ChatRequest:
    """The chat that `body` asks for.

    Raises:
        RequestError: something that is not served; names it.
    """
    _check(body)
    items = body.input
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    messages = list(_messages(items))
    if body.instructions:
        messages.insert(0, ChatMessage("system", body.instructions))
    return ChatRequest(
        model=body.model,
        messages=messages,
        tools=[_tool(tool) for tool in body.tools or () if is_function(tool)],
        tool_choice=body.tool_choice,
        response_format=_response_format(body),
        parallel_tool_calls=body.parallel_tool_calls,
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        stream=body.stream,
        cache_salt=body.cache_salt,
        chat_template_kwargs=body.chat_template_kwargs,
        session_id=body.session_id,
        ttl=body.ttl,
        next_models=body.next_models,
    )


def is_function(tool: Mapping[str, Any]) -> bool:
    """Whether a tool is the client's function; others would have to be run by the server."""
    return tool.get("type") == "function"


def _check(body: ResponsesRequest) -> None:
    for name in ("previous_response_id", "conversation", "prompt", "background"):
        if getattr(body, name):
            raise RequestError(
                f"{name} is not served: nothing is stored; send the whole conversation as input",
                param=name,
            )
    if body.top_logprobs:
        raise RequestError("top_logprobs is not served here; use a chat", param="top_logprobs")


def _response_format(body: ResponsesRequest) -> dict[str, Any] | None:
    """`text.format` in the chat's form, which nests."""
    given = (body.text or {}).get("format")
    if given is None:
        return None
    if not is_mapping(given):
        raise RequestError("text.format must be an object", param="text.format")
    if given.get("type") != "json_schema":
        return dict(given)
    if "schema" not in given:
        raise RequestError("text.format.schema is missing", param="text.format.schema")
    return {"type": "json_schema", "json_schema": dict(given)}


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A flat function tool in the chat's form, which nests."""
    fields = ("name", "description", "parameters")
    return {"type": "function", "function": {f: tool[f] for f in fields if tool.get(f) is not None}}


def _messages(items: Sequence[Mapping[str, Any]]) -> Iterator[ChatMessage]:
    """Messages of `items`; thoughts, text and calls of the assistant that follow each other are one
    message, as they were when the model wrote them."""
    pending: ChatMessage | None = None
    for index, item in enumerate(items):
        message = _message(item, f"input[{index}]")
        if message.role != "assistant":
            if pending is not None:
                yield pending
            pending = None
            yield message
        elif pending is None or _is_complete(pending, message):
            if pending is not None:
                yield pending
            pending = message
        else:
            _merge(pending, message)
    if pending is not None:
        yield pending


def _is_complete(message: ChatMessage, following: ChatMessage) -> bool:
    """Whether what follows is of another turn: text after text, or after calls."""
    return bool(following.content or following.reasoning_content) and bool(
        message.content or message.tool_calls
    )


def _merge(message: ChatMessage, following: ChatMessage) -> None:
    message.content = following.content or message.content
    thoughts = [message.reasoning_content, following.reasoning_content]
    message.reasoning_content = "\n".join(text for text in thoughts if text) or None
    message.tool_calls = [*(message.tool_calls or ()), *(following.tool_calls or ())] or None


def _message(item: Mapping[str, Any], where: str) -> ChatMessage:
    match item.get("type", "message"):
        case "message":
            content = _text(item.get("content"), f"{where}.content")
            return _converted({"role": item.get("role"), "content": content}, where)
        case "function_call":
            function = ToolFunction(_string(item, "name", where), _string(item, "arguments", where))
            call = ToolCall(function, _string(item, "call_id", where))
            return ChatMessage("assistant", None, tool_calls=[call])
        case "function_call_output":
            output = _text(item.get("output"), f"{where}.output")
            return ChatMessage("tool", output, tool_call_id=_string(item, "call_id", where))
        case "reasoning":
            parts: Any = item.get("content") or item.get("summary") or []
            thoughts = _text(parts, f"{where}.content")
            return ChatMessage("assistant", None, reasoning_content=thoughts)
        case kind:
            raise RequestError(
                f"{where}: input item {str(kind)[:100]!r} is not served; message, function_call, "
                "function_call_output and reasoning are",
                param=where,
            )


def _converted(fields: Mapping[str, Any], where: str) -> ChatMessage:
    try:
        return msgspec.convert(fields, ChatMessage)
    except msgspec.ValidationError as error:
        raise RequestError(str(error).replace("`", "'"), param=where) from None


def _string(item: Mapping[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{where}.{name} must be a string", param=f"{where}.{name}")
    return value


def _text(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not is_list(content):
        raise RequestError(f"{where} must be a string or a list of parts", param=where)
    texts: list[str] = []
    for index, part in enumerate(content):
        kind = part.get("type") if is_object(part) else None
        text = part.get("text") if is_object(part) else None
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            raise RequestError(
                f"{where}[{index}]: content part {str(kind)[:100]!r} is not served; only text is",
                param=f"{where}[{index}]",
            )
        texts.append(text)
    return "\n".join(texts)
