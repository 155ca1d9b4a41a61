"""What a request restricts the tokens of its answers to, whichever field says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pshare_jax.core.constraints import GrammarSpec, Thoughts
from pshare_jax.errors import RequestError
from pshare_jax.frontend.chat import Prompt, usable_tools
from pshare_jax.frontend.model_format import ModelFormat
from pshare_jax.frontend.reasoning import CLOSING, OPENING
from pshare_jax.frontend.requests import ChatRequest, GenerationRequest
from pshare_jax.frontend.tool_calls.grammars import calls_grammar
from pshare_jax.text.grammar import GrammarLimits
from pshare_jax.text.grammar_spec import from_response_format, from_structured_outputs
from pshare_jax.text.tokenizer import Tokenizer

# vLLM's older spellings of what `structured_outputs` holds.
_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
_JSON = ("json_object", "json_schema")


@dataclass(frozen=True)
class AskedGrammar:
    """A grammar, and the field of the request that asks for it."""

    spec: GrammarSpec
    param: str


def asked_grammar(body: GenerationRequest, limits: GrammarLimits) -> AskedGrammar | None:
    """The grammar that a request asks for, tools aside.

    Raises:
        RequestError: it is malformed or too large, or there are two.
    """
    specs = {
        "response_format": from_response_format(body.response_format, limits),
        "structured_outputs": from_structured_outputs(body.structured_outputs, limits),
        **{old: _guided(body, old, limits) for old in _GUIDED},
    }
    found = [AskedGrammar(spec, param) for param, spec in specs.items() if spec is not None]
    if len(found) > 1:
        raise RequestError(
            f"give one of {found[0].param} and {found[1].param}, not both", param=found[1].param
        )
    return found[0] if found else None


def chat_grammar(
    body: ChatRequest, model: ModelFormat, tokenizer: Tokenizer, limits: GrammarLimits
) -> AskedGrammar | None:
    """The grammar of a chat's answer, calls that are forced included.

    Where a JSON answer is asked for and tools may be called, it is either of them; where they must
    be, `response_format` has no text to be about, as with OpenAI.

    Raises:
        RequestError: what cannot be served; names the field.
    """
    asked = asked_grammar(body, limits)
    tools = [tool["function"] for tool in usable_tools(body)]
    param = "function_call" if body.functions else "tool_choice"
    wanted = _forced(body.function_call if body.functions else body.tool_choice, tools, param)
    if wanted is None and (asked is None or not tools or asked.spec.kind not in _JSON):
        return asked
    if model.parser is None:
        if wanted is None:
            return asked
        raise RequestError(f"{param}: this model's calls have no known format", param=param)
    if wanted is not None and asked is not None and asked.param != "response_format":
        raise RequestError(f"{param} forces calls: leave {asked.param} out", param=asked.param)
    spec = calls_grammar(
        model.parser.style,
        tools if wanted is None else wanted,
        one_call=bool(body.functions) or body.parallel_tool_calls is False,
        token_id=tokenizer.token_id,
        limits=limits,
        answer=None if wanted is not None or asked is None else asked.spec,
    )
    return AskedGrammar(spec, param if wanted is not None or asked is None else asked.param)


def thoughts_before(
    grammar: AskedGrammar | None, model: ModelFormat, prompt: Prompt, tokenizer: Tokenizer
) -> Thoughts | None:
    """What the model may think before the answer that follows `grammar`.

    Raises:
        RequestError: the tokenizer has no tokens for where thoughts begin and end.
    """
    if grammar is None or not model.reasoning or prompt.after_reasoning:
        return None
    opening, closing = tokenizer.token_id(OPENING), tokenizer.token_id(CLOSING)
    if opening is None or closing is None:
        raise RequestError(
            f"{grammar.param}: the model thinks first, and its tokenizer has no tokens "
            f"{OPENING} and {CLOSING} that say when the answer begins",
            param=grammar.param,
        )
    return Thoughts(opening, closing, prompt.in_reasoning)


def _guided(body: GenerationRequest, old: str, limits: GrammarLimits) -> GrammarSpec | None:
    value, new = getattr(body, old), _GUIDED[old]
    if value is None:
        return None
    try:
        return from_structured_outputs({new: value}, limits, old)
    except RequestError as error:
        raise RequestError(str(error).replace(f"{old}.{new}", old), param=old) from None


def _forced(
    choice: str | Mapping[str, Any] | None, tools: Sequence[Mapping[str, Any]], param: str
) -> list[Mapping[str, Any]] | None:
    """The functions of which one must be called; None where none has to be."""
    match choice:
        case None | "none" | "auto":
            return None
        case "required":
            if not tools:
                raise RequestError(f"{param} 'required' needs tools", param=param)
            return list(tools)
        case {"function": {"name": str(name)}} | {"name": str(name)}:
            named = [tool for tool in tools if tool["name"] == name]
            if not named:
                raise RequestError(f"{param}: there is no tool {name[:100]!r}", param=param)
            return named
        case _:
            raise RequestError(
                f"{param} must be none, auto, required or name a function", param=param
            )
