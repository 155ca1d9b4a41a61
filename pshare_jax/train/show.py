"""`--show 3`: examples as they are trained, for people to look at."""

from __future__ import annotations

from collections.abc import Iterator

from pshare_jax.core.split_rule import SplitRule
from pshare_jax.errors import printable
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.train.data import Example

_OPEN, _CLOSE = "⟦", "⟧"
_SPLIT = "‖"
LEGEND = (
    f"{_OPEN}what is trained{_CLOSE}; from {_SPLIT} on the decode module reads the last answer's "
    "prompt itself, what is before comes from the base's KV"
)


def show_examples(
    examples: list[Example], tokenizer: Tokenizer, rule: SplitRule | None
) -> Iterator[str]:
    """Lines that show `examples`: their text with what is trained, and what was dropped.

    Args:
        examples: to show.
        tokenizer: the base's.
        rule: the split rule; None where the module reads all of a prompt itself.
    """
    yield LEGEND
    for example in examples:
        trained = sum(turn.end - turn.start for turn in example.turns)
        yield ""
        yield f"{example.source}: {len(example.tokens)} tokens, {trained} trained"
        yield printable(_marked(example, tokenizer, rule))
        for number, turn in enumerate(example.turns, start=1):
            covered = rule.split(example.tokens[: turn.start].tolist()).covered if rule else 0
            weight = "" if turn.weight == 1 else f", weight {turn.weight:g}"
            yield (
                f"  answer {number}: {covered} tokens from the base's KV, {turn.start - covered} "
                f"read, {turn.end - turn.start} trained{weight}"
            )
        if not example.turns:
            yield "  no answer: the teacher gives it"
        if example.dropped:
            yield f"  dropped: {', '.join(example.dropped)}"


def _marked(example: Example, tokenizer: Tokenizer, rule: SplitRule | None) -> str:
    """The text with marks: where the last answer's prompt is split, and around answers."""
    marks: dict[int, str] = {}
    for turn in example.turns:
        marks[turn.start] = marks.get(turn.start, "") + _OPEN
        marks[turn.end] = _CLOSE + marks.get(turn.end, "")
    if rule is not None:
        last = example.turns[-1].start if example.turns else len(example.tokens)
        split = rule.split(example.tokens[:last].tolist()).covered
        marks[split] = marks.get(split, "") + _SPLIT
    text, before = "", 0
    for place in sorted(marks):
        text += tokenizer.decode(example.tokens[before:place].tolist(), skip_special_tokens=False)
        text += marks[place]
        before = place
    return text + tokenizer.decode(example.tokens[before:].tolist(), skip_special_tokens=False)
