"""Chat templates by name, and what is lost where served models have different ones.

Prompts share KV from their first token on, so the same messages rendered by two templates share
nothing. How much that is, is counted here, by messages that another template has rendered before.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
import xxhash
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from pshare_jax.serve.engine_api import Engine
from pshare_jax.text.tokenizer import Tokenizer

MOST_REMEMBERED = 16384
"""Beginnings of chats: one for each message of each chat."""

Beginnings = list[tuple[bytes, int]]
"""Of a chat up to and with each of its messages: a digest, and how many bytes that is."""


def template_name(tokenizer: Tokenizer) -> str | None:
    """Names the chat templates of a model: prompts of two models begin alike if their names do."""
    if not tokenizer.has_chat_template:
        return None
    text = json.dumps(tokenizer.chat_templates, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def beginnings(shared_by: Any, messages: Sequence[Any]) -> Beginnings:
    """The beginnings of a chat.

    Args:
        shared_by: what besides messages decides whether prompts begin alike, as plain data.
        messages: structs or plain data.
    """
    first = msgspec.json.encode(shared_by)
    state, size = xxhash.xxh3_128(first), len(first)
    found: Beginnings = []
    for message in messages:
        data = msgspec.json.encode(message)
        state.update(data)
        size += len(data)
        found.append((state.digest(), size))
    return found


class TemplateLosses(Collector):
    """Counts prompt tokens whose messages another template has rendered, and this one has not.

    Belongs to one thread, but for `collect`.

    Args:
        engine: whose models are asked.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._names: WeakKeyDictionary[Tokenizer, str | None] = WeakKeyDictionary()
        self._seen: OrderedDict[bytes, set[str]] = OrderedDict()
        self._lost: Counter[str] = Counter()

    def name(self, model: str) -> str | None:
        """The name of a served model's template."""
        tokenizer = self._engine.tokenizer_of(model)
        if tokenizer not in self._names:
            self._names[tokenizer] = template_name(tokenizer)
        return self._names[tokenizer]

    def may_lose(self, model: str) -> bool:
        """Whether the chats of a model could have shared KV with one of another template."""
        shared = [n for n, about in self._engine.models.items() if about.sharing == "shared"]
        return model in shared and len({self.name(other) for other in shared}) > 1

    def chat(self, model: str, begun: Beginnings, tokens: int) -> None:
        """Notes a chat that a model is asked; its prompt has so many tokens.

        The part that is lost is taken to have as many of them as its share of the bytes.
        """
        template = self.name(model)
        if template is None or not begun:
            return
        here = elsewhere = 0
        for digest, size in begun:
            names = self._seen.setdefault(digest, set())
            self._seen.move_to_end(digest)
            if template in names:
                here = size
            elif names:
                elsewhere = size
            names.add(template)
        while len(self._seen) > MOST_REMEMBERED:
            self._seen.popitem(last=False)
        self._lost[model] += tokens * max(0, elsewhere - here) // begun[-1][1]

    def collect(self) -> Iterable[Metric]:
        """One counter, with a series for each model."""
        family = CounterMetricFamily(
            "pshare_template_lost_tokens",
            "Prompt tokens, about, whose messages another chat template had rendered before.",
            labels=["model_name"],
        )
        for model in list(self._engine.models):
            family.add_metric([model], self._lost[model])
        yield family
