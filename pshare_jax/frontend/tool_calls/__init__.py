"""Function calls in a model's text: parsers by name, for streams and for whole answers."""

from __future__ import annotations

from pshare_jax.errors import ConfigError
from pshare_jax.frontend.tool_calls.json_blocks import Hermes, Llama3Json, Mistral
from pshare_jax.frontend.tool_calls.parser import ToolParser
from pshare_jax.frontend.tool_calls.pythonic import Pythonic
from pshare_jax.frontend.tool_calls.xml_blocks import XmlBlocks

_PARSERS: dict[str, type[ToolParser]] = {
    "hermes": Hermes,
    "llama3_json": Llama3Json,
    "mistral": Mistral,
    "pythonic": Pythonic,
    "qwen3_coder": XmlBlocks,
}
# What a chat template that has tools tells the model to write, and the parser of that.
_SIGNS = (
    ("[TOOL_CALLS]", "mistral"),
    ("<tool_call>", "hermes"),
    ("func_name1(", "pythonic"),
    ("<|python_tag|>", "llama3_json"),
    ('"parameters": dictionary', "llama3_json"),
)
# Formats whose opening tag looks like Hermes': Qwen 3 Coder's, and others, which are not known.
_XML_SIGN, _XML_PARAMETER = "<function=", "<parameter="


def register(name: str, parser: type[ToolParser]) -> None:
    """Adds a parser, which configurations may then name.

    Raises:
        ConfigError: the name is taken by another.
    """
    if _PARSERS.setdefault(name, parser) is not parser:
        raise ConfigError(f"tool parser {name!r} is registered already")


def parser_named(name: str) -> type[ToolParser]:
    """The parser of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in _PARSERS:
        raise ConfigError(f"no tool parser {name!r}; there are {', '.join(sorted(_PARSERS))}")
    return _PARSERS[name]


def detect(chat_template: str) -> str | None:
    """The name of the parser for what a chat template asks a model to write; None if it says
    nothing that is known."""
    if _XML_SIGN in chat_template:
        return "qwen3_coder" if _XML_PARAMETER in chat_template else None
    return next((name for sign, name in _SIGNS if sign in chat_template), None)
