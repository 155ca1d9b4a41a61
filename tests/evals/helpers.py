"""Items, files of them, and answers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pshare_jax.evals.backend import Answer
from pshare_jax.evals.items import Item, parse_item

FUNCTION = {
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {
        "type": "dict",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}


def record(name: str, question: str, **fields: Any) -> dict[str, Any]:
    """A line of a file of items: kind exact, unless `fields` say otherwise."""
    messages = [{"role": "user", "content": question}]
    return {"id": name, "kind": "exact", "messages": messages, "reference": "yes", **fields}


def item(name: str = "a", question: str = "well?", **fields: Any) -> Item:
    return parse_item(json.dumps(record(name, question, **fields)))


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(one)}\n" for one in records))
    return path


class Scripted:
    """A back-end whose answers are given by item id."""

    def __init__(self, texts: dict[str, str]):
        self.texts = texts

    def describe(self) -> dict[str, Any]:
        return {"backend": "scripted"}

    def answer(self, items, sampling, on_answer) -> None:
        # Backwards: answers come in any order.
        for index in reversed(range(len(items))):
            on_answer(index, Answer(self.texts[items[index].id], "stop", 7, 3))
