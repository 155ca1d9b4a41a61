"""From the prompts or messages of a request to token ids.

Nothing here waits for anything, but long texts take their time: callers with an event loop use a
thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from pshare_jax.errors import RequestError
from pshare_jax.frontend.params import Limits, check_token_ids, resolve_max_tokens
from pshare_jax.frontend.plain_text import PlainText
from pshare_jax.frontend.reasoning import CLOSING, OPENING
from pshare_jax.frontend.requests import ChatMessage, ChatRequest, CompletionRequest, Tool, ToolCall
from pshare_jax.frontend.tool_prompt import ToolPrompt, with_tools
from pshare_jax.plain_data import is_object
from pshare_jax.text.tokenizer import Tokenizer

MAX_TOOLS = 1024
ROLES = ("system", "developer", "user", "assistant", "tool")
"""`function` is taken too; it is an older name of `tool`."""


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Args:
        token_ids: what the model reads.
        text: the client's text, if that is what it gave.
        in_reasoning: whether it ends within the model's thoughts.
        after_reasoning: whether it ends with the end of thoughts, so that there will be none.
    """

    token_ids: tuple[int, ...]
    text: str | None = None
    in_reasoning: bool = False
    after_reasoning: bool = False


@dataclass(frozen=True)
class TemplateOptions:
    """How messages become a prompt.

    Args:
        add_generation_prompt: whether an assistant message is begun.
        variables: more variables of the chat template.
        add_special_tokens: whether the tokenizer's own special tokens go around the text, which
            templates write themselves.
        truncate: how many of the last tokens are kept: None is all, -1 as many as fit.
        tool_prompt: how the model is told of its tools.
        special_tokens: whether special tokens that messages spell out are such, and not text.
    """

    add_generation_prompt: bool = True
    variables: Mapping[str, Any] | None = None
    add_special_tokens: bool = False
    truncate: float | None = None
    tool_prompt: ToolPrompt = "template"
    special_tokens: bool = False


def completion_prompts(
    body: CompletionRequest, tokenizer: Tokenizer, limits: Limits
) -> list[Prompt]:
    """The prompts of `body`: a text, token ids, or a list of either.

    Raises:
        RequestError: too many prompts; an empty, mixed or too long one; an id out of range.
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
    if len(given) > limits.max_prompts:
        raise RequestError(
            f"prompt holds {len(given)} prompts; the server takes {limits.max_prompts} a request",
            param="prompt",
        )
    keep = _truncation(body.truncate_prompt_tokens, limits)
    special = body.add_special_tokens is not False
    prompts: list[Prompt] = []
    for item in given:
        if isinstance(item, str):
            ids = encode(tokenizer, item, limits, "prompt", special, keep)
            prompts.append(Prompt(tuple(ids), item if keep is None else None))
        else:
            prompts.append(Prompt(_given_ids(item, limits, keep)))
    if not all(prompt.token_ids for prompt in prompts):
        raise RequestError("prompt must hold at least one token", param="prompt")
    return prompts


def _given_ids(item: Any, limits: Limits, keep: int | None) -> tuple[int, ...]:
    ids = item if keep is None else item[-keep:]
    # Counted before they are looked at.
    resolve_max_tokens(None, None, len(ids), limits, "prompt")
    check_token_ids(ids, limits.vocab_size, "prompt")
    return tuple(ids)


def _truncation(given: float | None, limits: Limits) -> int | None:
    """How many of a prompt's last tokens are kept; None for all. -1 is what the model can take."""
    if given is None:
        return None
    if given != -1 and not 1 <= given < limits.max_model_len:
        raise RequestError(
            f"truncate_prompt_tokens must be -1 or between 1 and {limits.max_model_len - 1}",
            param="truncate_prompt_tokens",
        )
    return limits.max_model_len - 1 if given == -1 else int(given)


def chat_messages(messages: Sequence[Mapping[str, Any]]) -> list[ChatMessage]:
    """Messages in OpenAI's form, checked.

    Raises:
        RequestError: names the message and the field at fault.
    """
    try:
        return msgspec.convert(list(messages), list[ChatMessage])
    except msgspec.ValidationError as error:
        reason = str(error).replace("`", "'").replace("$", "messages")
        if "enum" in reason and ".role" in reason:
            reason += f"; the roles are {', '.join(ROLES)}"
        raise RequestError(f"messages: {reason}", param="messages") from None


def chat_prompt(
    tokenizer: Tokenizer,
    limits: Limits,
    messages: Sequence[ChatMessage],
    tools: Sequence[Mapping[str, Any]] | None = None,
    options: TemplateOptions | None = None,
) -> Prompt:
    """The messages as the model's chat template writes them.

    Args:
        tokenizer: whose chat template it is.
        limits: of the served models.
        messages: the conversation.
        tools: functions that the model may call, in OpenAI's form.
        options: see there.

    Raises:
        RequestError: messages or tools that cannot be rendered, or that are too long.
    """
    options = options or TemplateOptions()
    if not messages:
        raise RequestError("messages must hold at least one message", param="messages")
    if len(messages) > limits.max_model_len:
        # Each is a token at least.
        raise RequestError(
            f"messages holds {len(messages)} messages; the context has {limits.max_model_len} "
            "tokens",
            param="messages",
            code="context_length_exceeded",
        )
    check_tools(tools or ())
    keep = _truncation(options.truncate, limits)
    plain = PlainText(tokenizer)
    text = render_chat(tokenizer, template_messages(messages), tools, options, plain)
    check_length(tokenizer, plain.shown(text), limits, "messages", keep)
    ids = plain.encode(text, options.add_special_tokens)
    ids = cut_to_fit(ids, limits, "messages", keep)
    if not ids:
        raise RequestError("the chat template gave an empty prompt", param="messages")
    end = text.rstrip()
    return Prompt(
        tuple(ids), in_reasoning=end.endswith(OPENING), after_reasoning=end.endswith(CLOSING)
    )


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    options: TemplateOptions,
    plain: PlainText,
) -> str:
    """The text of a conversation, to be encoded by `plain`. Training data goes the same way.

    Args:
        tokenizer: whose chat template it is.
        messages: see `template_messages`.
        tools: functions in OpenAI's form.
        options: see there.
        plain: hides special tokens; may be used for several beginnings of one conversation.

    Raises:
        RequestError: the template refuses or fails on them.
    """
    conversation = [dict(message) for message in messages]
    if options.tool_prompt != "template":
        conversation, tools = with_tools(conversation, tools or (), options.tool_prompt), None
    variables = options.variables
    if not options.special_tokens:
        conversation, tools, variables = plain.hide([conversation, tools, variables])
    return tokenizer.apply_chat_template(
        conversation, tools, options.add_generation_prompt, variables
    )


def encode(
    tokenizer: Tokenizer,
    text: str,
    limits: Limits,
    param: str,
    add_special_tokens: bool = True,
    keep: int | None = None,
) -> list[int]:
    """Token ids of `text`, the last `keep` of them.

    Raises:
        RequestError: more tokens than the model can take. A text that is sure to be too long is
            refused untokenised.
    """
    check_length(tokenizer, text, limits, param, keep)
    return cut_to_fit(tokenizer.encode(text, add_special_tokens), limits, param, keep)


def check_length(
    tokenizer: Tokenizer, text: str, limits: Limits, param: str, keep: int | None
) -> None:
    """Raises RequestError for a text that is sure to be too long, unless it will be cut."""
    if keep is None:
        resolve_max_tokens(None, None, tokenizer.min_tokens(text), limits, param)


def cut_to_fit(ids: list[int], limits: Limits, param: str, keep: int | None) -> list[int]:
    """The last `keep` of `ids`; all of them if it is None.

    Raises:
        RequestError: they are too many.
    """
    if keep is not None:
        return ids[-keep:]
    resolve_max_tokens(None, None, len(ids), limits, param)
    return ids


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """The messages as chat templates get them: text parts joined by line feeds, arguments decoded.

    Raises:
        RequestError: a content that is missing or no text; names the message.
    """
    return [_template_message(message, index) for index, message in enumerate(messages)]


def _template_message(message: ChatMessage, index: int) -> dict[str, Any]:
    # Templates know the older name of the developer's role.
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    fields: dict[str, Any] = {"role": role, "content": _text_content(message, index)}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            fields[name] = value
    calls = list(message.tool_calls or ())
    if message.function_call is not None:
        calls.append(ToolCall(message.function_call))
    if calls:
        fields["tool_calls"] = [_template_call(call) for call in calls]
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
            arguments = decoded if is_object(decoded) else arguments
        except (msgspec.DecodeError, RecursionError):
            pass  # a model may have produced broken JSON: it is shown as it was
    function: dict[str, Any] = {"name": call.function.name, "arguments": arguments or {}}
    return {"type": call.type, "id": call.id, "function": function}


def usable_tools(body: ChatRequest) -> list[dict[str, Any]]:
    """The functions that the model may call, in OpenAI's form; none if the client says so.

    Raises:
        RequestError: something in `tools` or `functions` is none.
    """
    if body.functions:
        if body.function_call == "none":
            return []
        tools = [{"type": "function", "function": function} for function in body.functions]
    else:
        tools = body.tools if body.tools and body.tool_choice != "none" else []
    check_tools(tools)
    return tools


def parameter_schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON schemas of the functions' parameters by name; None where a function has none."""
    return {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}


def check_tools(tools: Sequence[Mapping[str, Any]]) -> None:
    """Raises RequestError unless all `tools` are functions in OpenAI's form."""
    if len(tools) > MAX_TOOLS:
        raise RequestError(
            f"tools may hold at most {MAX_TOOLS} tools, got {len(tools)}", param="tools"
        )
    for index, tool in enumerate(tools):
        try:
            msgspec.convert(tool, Tool)
        except msgspec.ValidationError as error:
            reason = str(error).replace("`", "'")
            raise RequestError(
                f"tools[{index}] is not a function tool: {reason}", param=f"tools[{index}]"
            ) from None
