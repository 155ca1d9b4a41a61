"""Tells a model of its tools where the chat template cannot, and shows it the calls of the past."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pshare_jax.plain_data import is_list, is_mapping, is_object

# `template`: the chat template does it. The others are for templates that know no tools.
ToolPrompt = Literal["template", "hermes", "pythonic"]

Message = dict[str, Any]

# Qwen 2.5's words, which follow those of Hermes 2 Pro.
_HERMES = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def with_tools(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], style: ToolPrompt
) -> list[Message]:
    """The conversation in messages of plain text that any chat template renders.

    Args:
        messages: of the roles system, user, assistant and tool; calls have objects as arguments.
        tools: functions in OpenAI's form; may be empty, though calls of the past are there.
        style: `hermes`: JSON in a system message, calls and results in tags; `pythonic`: signatures
            before the last question, calls in Python's syntax.
    """
    plain = [_plain(message, style) for message in messages]
    if not tools or style == "template":
        return plain
    if style == "pythonic":
        return _with_signatures(plain, tools)
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    prompt = _HERMES.format(tools=lines)
    if plain and plain[0]["role"] == "system":
        first = {**plain[0], "content": f"{plain[0]['content']}\n\n{prompt}"}
        return [first, *plain[1:]]
    return [{"role": "system", "content": prompt}, *plain]


def signature(function: Mapping[str, Any]) -> str:
    """`name(required: type, optional: type = ...): first sentence of the description.`

    Schemas of tools are the client's: what in one is no schema is left out, or of any type.
    """
    schema: Mapping[str, Any] = function.get("parameters") or {}
    properties, required = schema.get("properties"), schema.get("required")
    if not is_list(required):
        required = []
    parameters = [
        f"{name}: {_type_of(value)}{'' if name in required else ' = ...'}"
        for name, value in (properties.items() if is_mapping(properties) else ())
    ]
    description = function.get("description")
    sentence = description.split(". ")[0].rstrip(".") if isinstance(description, str) else ""
    return f"{function['name']}({', '.join(parameters)}): {sentence}."


def _type_of(schema: Any) -> Any:
    return schema.get("type", "any") if is_mapping(schema) else "any"


def _with_signatures(messages: list[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The form in which the `tools` module has learned questions; one that has it already stays."""
    asked = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=None)
    signatures = "\n".join(signature(tool["function"]) for tool in tools)
    if asked is None:
        return [{"role": "system", "content": signatures}, *messages]
    question = messages[asked]
    if signatures in question["content"]:
        return messages
    content = f"{signatures}\n\n{question['content']}\nAnswer with one function call."
    return [*messages[:asked], {**question, "content": content}, *messages[asked + 1 :]]


def _plain(message: Message, style: ToolPrompt) -> Message:
    content = message["content"]
    if message["role"] == "tool":
        if style == "hermes":
            content = f"<tool_response>\n{content}\n</tool_response>"
        return {"role": "user", "content": content}
    if not message.get("tool_calls"):
        return message
    calls = [_call_text(call["function"], style) for call in message["tool_calls"]]
    lines = [content, *calls] if content else calls
    return {"role": message["role"], "content": "\n".join(lines)}


def _call_text(function: Mapping[str, Any], style: ToolPrompt) -> str:
    name, arguments = function["name"], function["arguments"]
    if style == "pythonic" and is_object(arguments):
        return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"
