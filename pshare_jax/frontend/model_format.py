"""How one served model writes thoughts and calls: as configured, or as its chat template says."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from pshare_jax.config import Reasoning
from pshare_jax.frontend.answers import AnswerReader
from pshare_jax.frontend.reasoning import CLOSING, OPENING, ReasoningSplitter
from pshare_jax.frontend.tool_calls import detect, parser_named
from pshare_jax.frontend.tool_calls.parser import ToolParser
from pshare_jax.frontend.tool_prompt import ToolPrompt

log = logging.getLogger(__name__)

_TOOLS = re.compile(r"\btools\b")


@dataclass(frozen=True)
class ModelFormat:
    """What is special about one model's prompts and answers.

    Args:
        parser: finds calls in answers; None when they are handed on as text.
        tool_prompt: how the model is told of its tools.
        reasoning: whether thoughts are split off.
    """

    parser: type[ToolParser] | None = None
    tool_prompt: ToolPrompt = "template"
    reasoning: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """Special tokens that must not be left out of an answer's text."""
        tags = (OPENING, CLOSING) if self.reasoning else ()
        return tags + (self.parser.markers if self.parser is not None else ())

    def reader(
        self, names: Collection[str], in_reasoning: bool = False, one_call: bool = False
    ) -> AnswerReader:
        """A reader for one answer.

        Args:
            names: the functions that may be called, and the JSON schemas of their parameters if
                those are known; with none, calls are not looked for.
            in_reasoning: whether the prompt has opened the thoughts.
            one_call: whether all calls but the first are dropped.
        """
        return AnswerReader(
            ReasoningSplitter(in_reasoning) if self.reasoning else None,
            self.parser(names) if self.parser is not None and names else None,
            one_call,
        )


def tool_prompt(parser: str | None, chat_template: str) -> ToolPrompt:
    """How a model is told of its tools whose calls the parser of that name reads."""
    if _TOOLS.search(chat_template):
        return "template"
    return "pythonic" if parser == "pythonic" else "hermes"


def check_tool_parser(name: str | None) -> None:
    """Checks a setting `tool_parser`, or that there is none, before a model is loaded with it.

    Raises:
        ConfigError: no parser of that name.
    """
    if name not in (None, "auto", "none"):
        parser_named(name)


def model_format(
    model: str, tool_parser: str, reasoning: Reasoning, chat_template: str
) -> ModelFormat:
    """What was said of a model, or its chat template says where that was `auto`.

    Args:
        model: its name.
        tool_parser: see `ModelEntry`.
        reasoning: see `ModelEntry`.
        chat_template: its own.

    Raises:
        ConfigError: no parser of the configured name.
    """
    knows_tools = bool(_TOOLS.search(chat_template))
    name = tool_parser
    if name == "auto":
        name = detect(chat_template) if knows_tools else "hermes"
        if name is None:
            log.warning(
                "model %s: the chat template's format of tool calls is not known; calls are handed "
                "on as text. Name a parser: models[].tool_parser",
                model,
            )
    parser = None if name in (None, "none") else parser_named(name)
    prompt = tool_prompt(name, chat_template)
    splits = reasoning == "on" or (reasoning == "auto" and OPENING in chat_template)
    return ModelFormat(parser, prompt, splits)


class FormattedModel(Protocol):
    """What a served model says of its format."""

    @property
    def name(self) -> str:
        """Under which it is served."""
        ...

    @property
    def tool_parser(self) -> str:
        """See `ModelEntry`."""
        ...

    @property
    def reasoning(self) -> Reasoning:
        """See `ModelEntry`."""
        ...


class ModelFormats:
    """The formats of the models that are served at present, each worked out once.

    Args:
        template_of: the chat template of the model of a name.
    """

    def __init__(self, template_of: Callable[[str], str]):
        self._template_of = template_of
        self._known: dict[str, tuple[FormattedModel, ModelFormat]] = {}

    def of(self, model: FormattedModel) -> ModelFormat:
        """The format of a model.

        Raises:
            ConfigError: see `model_format`.
        """
        of, found = self._known.get(model.name, (None, None))
        # What takes a module's place may write in another way.
        if found is None or of is not model:
            template = self._template_of(model.name)
            found = model_format(model.name, model.tool_parser, model.reasoning, template)
            self._known[model.name] = model, found
        return found
