"""A task for several modules: each turn of a conversation is answered by another one.

A turn asks about the answer before it, which another module wrote: what a module reads of a context
is as often the work of others as it is a user's. There is one task for each role, on conversations
up to its turn; and `play`, in which the modules answer each other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pshare_jax.evals.grading import grade
from pshare_jax.evals.items import Item

ROLES = ("find", "count", "change", "compare")
"""Who answers, in this order."""
_THINGS = ("apples", "pears", "plums", "nuts", "eggs", "pens", "cups", "keys")
_KINDS = 4
_MOST = 40

Message = dict[str, Any]


def task_of(role: str) -> str:
    """The name of a role's task."""
    return f"relay-{role}"


@dataclass(frozen=True)
class Relay:
    """One conversation: a question and the right answer for each role."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]

    def messages(self, role: str) -> list[Message]:
        """The conversation up to and with the answer of `role`; earlier answers have weight 0."""
        turns = ROLES.index(role) + 1
        messages: list[Message] = []
        for turn, (question, answer) in enumerate(zip(self.questions, self.answers, strict=True)):
            if turn == turns:
                break
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
            if turn < turns - 1:
                messages[-1]["weight"] = 0
        return messages


def relays(seed: int, size: int) -> Iterator[Relay]:
    """`size` conversations; the same ones for the same seed."""
    rng = random.Random(seed)
    for _ in range(size):
        things = rng.sample(_THINGS, _KINDS)
        counts = rng.sample(range(2, _MOST), _KINDS)
        stock = ", ".join(f"{count} {thing}" for count, thing in zip(counts, things, strict=True))
        most = max(counts)
        sold = rng.randrange(1, most)
        other = rng.randrange(_KINDS)
        yield Relay(
            (
                f"The shop has {stock}. Of which thing does it have most? Answer with one word.",
                "How many of these does it have? Answer with a number.",
                f"It sells {sold} of them. How many are left? Answer with a number.",
                f"Is that more than the number of {things[other]} that the shop had? "
                "Answer yes or no.",
            ),
            (
                things[counts.index(most)],
                str(most),
                str(most - sold),
                "yes" if most - sold > counts[other] else "no",
            ),
        )


def play(
    items: Sequence[Item],
    answers: Mapping[str, str],
    answer: Callable[[str, Sequence[Item]], Sequence[str]],
) -> dict[str, list[bool]]:
    """Lets the modules answer each other.

    Args:
        items: conversations with all turns: those of the last role, whose last answer is left out.
        answers: the right last answer of each item, by its id.
        answer: gives a role's answers to items whose messages end with its question.

    Returns:
        For each role, which items it got right with the others' answers before its own.
    """
    right: dict[str, list[bool]] = {}
    so_far: list[list[Message]] = [[] for _ in items]
    for turn, role in enumerate(ROLES):
        asked, wanted = [], []
        for place, item in enumerate(items):
            so_far[place].append(item.messages[2 * turn])
            last = turn == len(ROLES) - 1
            wanted.append(answers[item.id] if last else item.messages[2 * turn + 1]["content"])
            asked.append(replace(item, messages=list(so_far[place]), reference=wanted[-1]))
        texts = answer(role, asked)
        right[role] = [grade(one, text).correct for one, text in zip(asked, texts, strict=True)]
        for place, text in enumerate(texts):
            # A turn without a word is a turn all the same.
            so_far[place].append({"role": "assistant", "content": text.strip() or "-"})
    return right
