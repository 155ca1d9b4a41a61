"""What generates the answers: a running server, or an engine in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pshare_jax.evals.items import Item


@dataclass(frozen=True)
class Sampling:
    """How answers are generated.

    Args:
        max_tokens: most tokens of an answer.
        temperature: 0 is greedy.
        seed: of each answer's random draws, when they are not greedy.
        stop: strings that end an answer.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What a model generated; the numbers of tokens are None when a server does not tell them."""

    text: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None


OnAnswer = Callable[[int, Answer], None]
"""Called with the index of an item and its answer, in the order in which answers are done."""


class Backend(Protocol):
    """Generates the answers of one model."""

    def describe(self) -> dict[str, Any]:
        """What generates, for the result file."""
        ...

    def answer(self, items: Sequence[Item], sampling: Sampling, on_answer: OnAnswer) -> None:
        """Answers all items, as many at once as it can.

        Raises:
            EvaluationError: an item that cannot be answered, by its id.
        """
        ...


def chat_request(model: str, item: Item, sampling: Sampling) -> dict[str, Any]:
    """The body of `POST /v1/chat/completions` for one item."""
    body: dict[str, Any] = {
        "model": model,
        "messages": item.messages,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
    }
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if item.tools:
        body["tools"] = item.tools
    return body
