"""Grades one answer of one item."""

from __future__ import annotations

from pshare_jax.evals import exact, final_number, programs, tools
from pshare_jax.evals.items import Item
from pshare_jax.evals.verdict import Grade


def grade(item: Item, text: str) -> Grade:
    """Whether `text` answers `item`.

    Answers of kind code are run, in a process of their own and with limits: see `sandbox.run`.
    Safe to call from several threads.
    """
    match item.kind:
        case "exact":
            return exact.grade(item.reference, text)
        case "math":
            return final_number.grade(item.reference, text)
        case "code":
            return programs.grade(item.reference, text)
        case "tools":
            return tools.grade(item.reference, item.tools, text)
