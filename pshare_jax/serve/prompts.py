"""From the prompts or messages of a request to token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from pshare_jax.errors import RequestError
from pshare_jax.serve.params import Limits, check_token_ids, resolve_max_tokens
from pshare_jax.serve.protocol import ChatMessage, CompletionRequest, Tool, ToolCall
from pshare_jax.text.tokenizer import Tokenizer

# Longer texts are tokenised in a thread, so that others' streams go on.
INLINE_CHARS = 8192


@dataclass(frozen=True)
class Prompt:
    """One prompt: its token ids, and its text when the client gave text."""

    token_ids: tuple[int, ...]
    text: str | None = None


async def completion_prompts(
    body: CompletionRequest, tokenizer: Tokenizer, limits: Limits
) -> list[Prompt]:
    """The prompts of `body`: a text, token ids, or a list of either.

    Raises:
        RequestError: an empty, mixed or too long prompt, or an id out of range.
    """
    given = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if not given:
        raise RequestError("prompt must not be an empty list", param="prompt")
    kinds = {type(item) for item in given}
    if len(kinds) > 1:
        raise RequestError(
            "prompt must hold only strings, only token ids or only lists of token ids",
            param="prompt",
        )
    if kinds == {int}:
        given = [given]
    prompts = []
    for item in given:
        if isinstance(item, str):
            ids = await encode(tokenizer, item, limits, "prompt")
            prompts.append(Prompt(tuple(ids), item))
        else:
            check_token_ids(item, limits.vocab_size, "prompt")  # type: ignore[arg-type]
            prompts.append(Prompt(tuple(item)))  # type: ignore[arg-type]
    if not all(prompt.token_ids for prompt in prompts):
        raise RequestError("prompt must hold at least one token", param="prompt")
    return prompts


async def chat_prompt(
    tokenizer: Tokenizer,
    limits: Limits,
    messages: Sequence[ChatMessage],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool | None,
    template_kwargs: Mapping[str, Any] | None,
) -> Prompt:
    """The messages as the model's chat template writes them.

    Raises:
        RequestError: messages or tools that cannot be rendered, or that are too long.
    """
    if not messages:
        raise RequestError("messages must hold at least one message", param="messages")
    _check_tools(tools or ())
    text = await asyncio.to_thread(
        tokenizer.apply_chat_template,
        [_template_message(message, index) for index, message in enumerate(messages)],
        tools,
        add_generation_prompt is not False,
        template_kwargs,
    )
    ids = await encode(tokenizer, text, limits, "messages", add_special_tokens=False)
    if not ids:
        raise RequestError("the chat template gave an empty prompt", param="messages")
    return Prompt(tuple(ids))


async def encode(
    tokenizer: Tokenizer, text: str, limits: Limits, param: str, add_special_tokens: bool = True
) -> list[int]:
    """Token ids of `text`; a text that is sure to be too long is refused untokenised."""
    resolve_max_tokens(None, None, tokenizer.min_tokens(text), limits, param)
    if len(text) <= INLINE_CHARS:
        return tokenizer.encode(text, add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens)


def _template_message(message: ChatMessage, index: int) -> dict[str, Any]:
    # Templates know the older name of the developer's role.
    role = "system" if message.role == "developer" else message.role
    fields: dict[str, Any] = {"role": role, "content": _text_content(message, index)}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            fields[name] = value
    if message.tool_calls:
        fields["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    return fields


def _text_content(message: ChatMessage, index: int) -> str:
    match message.content:
        case str(text):
            return text
        case list(parts):
            for position, part in enumerate(parts):
                if part.type != "text" or part.text is None:
                    raise RequestError(
                        f"content part {part.type[:100]!r} is not served; only 'text' with a "
                        "'text' field is",
                        param=f"messages[{index}].content[{position}]",
                    )
            return "\n".join(part.text or "" for part in parts)
        case _ if message.role == "assistant":
            return ""
        case _:
            raise RequestError(
                f"a message of role {message.role!r} needs content",
                param=f"messages[{index}].content",
            )


def _template_call(call: ToolCall) -> dict[str, Any]:
    # Templates write the arguments as JSON themselves; clients send back the JSON text.
    arguments = call.function.arguments
    if isinstance(arguments, str):
        try:
            decoded = msgspec.json.decode(arguments)
            arguments = decoded if isinstance(decoded, dict) else arguments
        except (msgspec.DecodeError, RecursionError):
            pass  # a model may have produced broken JSON: it is shown as it was
    function = {"name": call.function.name, "arguments": arguments or {}}
    return {"type": call.type, "id": call.id, "function": function}


def _check_tools(tools: Sequence[Mapping[str, Any]]) -> None:
    for index, tool in enumerate(tools):
        try:
            msgspec.convert(tool, Tool)
        except msgspec.ValidationError as error:
            reason = str(error).replace("`", "'")
            raise RequestError(
                f"tools[{index}] is not a function tool: {reason}", param=f"tools[{index}]"
            ) from None
