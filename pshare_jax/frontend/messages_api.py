"""Anthropic's Messages API: what a request may hold, and the chat that it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct

from pshare_jax.errors import RequestError
from pshare_jax.frontend.requests import (
    ChatMessage,
    ChatRequest,
    Ignored,
    ToolCall,
    ToolFunction,
    Whole,
    make_whole,
)
from pshare_jax.plain_data import is_list, is_object


class Message(Struct):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class CountTokensRequest(Struct, kw_only=True):
    """`POST /v1/messages/count_tokens`: what becomes a prompt."""

    model: str
    messages: list[Message]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Ignored = None
    chat_template_kwargs: dict[str, Any] | None = None
    betas: Ignored = None
    cache_control: Ignored = None
    context_management: Ignored = None
    mcp_servers: list[Any] | None = None
    output_config: Ignored = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    """`POST /v1/messages`."""

    max_tokens: Whole
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    cache_salt: str | None = None
    session_id: str | None = None
    ttl: float | None = None
    next_models: list[str] | None = None
    metadata: Ignored = None
    service_tier: Ignored = None
    container: Ignored = None
    inference_geo: Ignored = None

    def __post_init__(self) -> None:
        make_whole(self, "max_tokens")
        make_whole(self, "top_k")


def as_chat(body: CountTokensRequest) -> ChatRequest:
    """The chat that `body` asks for.

    Raises:
        RequestError: something that is not served; names it.
    """
    if body.mcp_servers:
        raise RequestError("mcp_servers is not served: the server calls nobody", "mcp_servers")
    messages: list[ChatMessage] = []
    if body.system:
        messages.append(ChatMessage("system", _text(body.system, "system")))
    for index, message in enumerate(body.messages):
        messages += _messages(message, f"messages[{index}].content")
    choice = body.tool_choice or {}
    chat = ChatRequest(
        model=body.model,
        messages=messages,
        tools=[_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools or ())],
        tool_choice=_tool_choice(choice),
        parallel_tool_calls=not choice.get("disable_parallel_tool_use"),
        chat_template_kwargs=body.chat_template_kwargs,
    )
    if isinstance(body, MessagesRequest):
        chat.max_tokens, chat.stream = body.max_tokens, body.stream
        chat.temperature, chat.top_p, chat.top_k = body.temperature, body.top_p, body.top_k
        chat.stop, chat.cache_salt = body.stop_sequences, body.cache_salt
        chat.session_id, chat.ttl, chat.next_models = body.session_id, body.ttl, body.next_models
    return chat


def _tool_choice(choice: Mapping[str, Any]) -> str | dict[str, Any]:
    match choice.get("type", "auto"):
        case "auto" | "none" as kind:
            return kind
        case "any":
            return "required"
        case "tool":
            return {
                "type": "function",
                "function": {"name": _string(choice, "name", "tool_choice")},
            }
        case _:
            raise RequestError(
                "tool_choice must be of type auto, any, tool or none", param="tool_choice"
            )


def _tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type", "custom") not in (None, "custom"):
        raise RequestError(
            f"{where}: tool type {str(tool['type'])[:100]!r} is not served; only the client's "
            "functions are",
            param=where,
        )
    function: dict[str, Any] = {
        "name": tool.get("name"),
        "parameters": tool.get("input_schema") or {},
    }
    if tool.get("description"):
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _messages(message: Message, where: str) -> Iterator[ChatMessage]:
    if isinstance(message.content, str):
        yield ChatMessage(message.role, message.content)
    elif message.role == "assistant":
        yield _assistant(message.content, where)
    else:
        yield from _results_and_text(message.role, message.content, where)


def _assistant(blocks: Sequence[Mapping[str, Any]], where: str) -> ChatMessage:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for index, block in enumerate(blocks):
        at = f"{where}[{index}]"
        match block.get("type"):
            case "text":
                texts.append(_string(block, "text", at))
            case "thinking":
                thoughts.append(_string(block, "thinking", at))
            case "redacted_thinking":
                pass  # of another's model, and encrypted
            case "tool_use":
                arguments = msgspec.json.encode(block.get("input") or {}).decode()
                function = ToolFunction(_string(block, "name", at), arguments)
                calls.append(ToolCall(function, _string(block, "id", at)))
            case kind:
                raise _not_served(kind, at)
    return ChatMessage(
        "assistant",
        "\n".join(texts),
        tool_calls=calls or None,
        reasoning_content="\n".join(thoughts) or None,
    )


def _results_and_text(
    role: Literal["user", "system"], blocks: Sequence[Mapping[str, Any]], where: str
) -> Iterator[ChatMessage]:
    """Results first, as they answer the calls before, then the text."""
    texts: list[str] = []
    for index, block in enumerate(blocks):
        at = f"{where}[{index}]"
        match block.get("type"):
            case "text":
                texts.append(_string(block, "text", at))
            case "tool_result":
                content = _text(block.get("content") or "", f"{at}.content")
                yield ChatMessage("tool", content, tool_call_id=_string(block, "tool_use_id", at))
            case kind:
                raise _not_served(kind, at)
    if texts or not blocks:
        yield ChatMessage(role, "\n".join(texts))


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not is_list(content):
        raise RequestError(f"{where} must be a string or a list of blocks", param=where)
    texts: list[str] = []
    for index, block in enumerate(content):
        at = f"{where}[{index}]"
        kind = block.get("type") if is_object(block) else None
        if kind != "text":
            raise _not_served(kind, at)
        texts.append(_string(block, "text", at))
    return "\n".join(texts)


def _string(block: Mapping[str, Any], name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{where}.{name} must be a string", param=f"{where}.{name}")
    return value


def _not_served(kind: Any, where: str) -> RequestError:
    return RequestError(
        f"{where}: content block {str(kind)[:100]!r} is not served; text, thinking, tool_use and "
        "tool_result are",
        param=where,
    )
