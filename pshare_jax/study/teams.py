"""Teams of modules, one for each role of `relay`: trained one after the other, then they play."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pshare_jax.core.split_rule import TailSetting
from pshare_jax.evals.intervals import bootstrap_interval
from pshare_jax.evals.items import Item
from pshare_jax.study.relay import ROLES, play
from pshare_jax.study.report import interval
from pshare_jax.study.rows import name_of

Answer = Callable[[Path, Sequence[Item], float | None, TailSetting], Sequence[str]]
"""From a module's folder, items, the share of the base's KV and the tail to the answers."""


def play_as_team(
    items: Sequence[Item], folders: dict[str, Path], share: float | None, tail: Any, answer: Answer
) -> dict[str, Any]:
    """The team's accuracy by turn, each turn with the others' answers before it, as JSON.

    Args:
        items: the last role's test items.
        folders: the module of each role.
        share: see `Team.modes`.
        tail: of the modules.
        answer: asks one module.
    """
    start = time.perf_counter()
    gold = {item.id: str(item.reference) for item in items}
    right = play(items, gold, lambda role, asked: answer(folders[role], asked, share, tail))
    whole = [all(turns) for turns in zip(*right.values(), strict=True)]
    found = {}
    for name, flags in {**right, "all turns": whole}.items():
        found[name] = {
            "accuracy": sum(flags) / len(flags),
            "interval": bootstrap_interval(flags),
            "correct": "".join(str(int(flag)) for flag in flags),
        }
    return {"turns": found, "seconds": round(time.perf_counter() - start, 1)}


def team_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: accuracy by turn of each team and way to read the context; seeds are averaged.

    Args:
        results: what `Study` keeps of teams.
    """
    if not results:
        return "**relay** (several modules in one conversation): not measured yet.\n"
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = defaultdict(list)
    for result in results:
        for mode in result["modes"]:
            key = (name_of(result), mode, result["examples"])
            groups[key].append(result["modes"][mode]["turns"])
    turns = (*ROLES, "all turns")
    lines = [
        "**relay** (several modules in one conversation; test accuracy % by turn, with the others' "
        "own answers before it)\n",
        f"| modules | context | examples each | seeds | {' | '.join(turns)} |",
        f"|---|---|--:|--:|{'--:|' * len(turns)}",
    ]
    for (name, mode, examples), group in sorted(groups.items()):
        cells = [name, mode, f"{examples:,}", str(len(group))]
        for turn in turns:
            flags = [[right == "1" for right in one[turn]["correct"]] for one in group]
            means = [statistics.mean(item) for item in zip(*flags, strict=True)]
            cells.append(interval(means, len(group)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
