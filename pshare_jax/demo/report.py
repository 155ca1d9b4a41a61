"""The demo's tables."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from rich.table import Table
from rich.text import Text

from pshare_jax.demo.session import Call, SessionResult

_MARKS = {True: "[right]", False: "[wrong]"}
_SHOWN = 200


def model_table(title: str, result: SessionResult) -> Table:
    """One row a model and a total: where its prompt tokens came from, and how fast it was.

    TTFT is the median time to the first token; tokens/s is the rate after it.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    for header in (
        "prompt\ntokens",
        "com-\nputed",
        "reused,\nown",
        "reused,\nothers'",
        "handed\nover MB",
        "TTFT\ns",
        "tokens\n/s",
    ):
        table.add_column(header, justify="right")
    models = list(dict.fromkeys(call.model for call in result.calls))
    for model in models:
        calls = [call for call in result.calls if call.model == model]
        table.add_row(model, *_cells(calls, result.handoff_bytes.get(model, 0)))
    table.add_section()
    table.add_row("all", *_cells(result.calls, sum(result.handoff_bytes.values())))
    return table


def comparison_table(shared: SessionResult, isolated: SessionResult) -> Table:
    """The same session with one shared prefill and with a prefill for each model."""
    table = Table(title="The same session", title_justify="left")
    table.add_column("sharing")
    for header in ("prompt tokens\ncomputed", "median\nTTFT s", "session\ns"):
        table.add_column(header, justify="right")
    for name, result in (("shared", shared), ("isolated", isolated)):
        table.add_row(
            name,
            f"{computed_tokens(result.calls):,}",
            f"{median(call.time_to_first_token for call in result.calls):.2f}",
            f"{result.seconds:.1f}",
        )
    return table


def answer_table(result: SessionResult) -> Table:
    """Each question, what the base answers and what the decode module trained for it answers."""
    table = Table(title="Questions that the decode modules were not trained on", show_lines=True)
    for header in ("question", "base", "its decode module"):
        table.add_column(header)
    for answer in result.answers:
        table.add_row(
            Text(_shortened(answer.question.text)),
            Text(f"{_MARKS[answer.base_right]} {_shortened(answer.base)}"),
            Text(f"{answer.question.model} {_MARKS[answer.own_right]} {_shortened(answer.own)}"),
        )
    return table


def computed_tokens(calls: Sequence[Call]) -> int:
    """Prompt tokens that were not found in the cache; each call's last one is the decoder's."""
    return sum(call.prompt_tokens - call.cached_tokens for call in calls)


def _cells(calls: Sequence[Call], handoff_bytes: int) -> list[str]:
    own = sum(call.cached_tokens - call.shared_tokens for call in calls)
    decoded = sum(call.completion_tokens - 1 for call in calls)
    seconds = sum(call.decode_time for call in calls)
    return [
        f"{sum(call.prompt_tokens for call in calls):,}",
        f"{computed_tokens(calls):,}",
        f"{own:,}",
        f"{sum(call.shared_tokens for call in calls):,}",
        f"{handoff_bytes / 1e6:,.1f}",
        f"{median(call.time_to_first_token for call in calls):.2f}",
        f"{decoded / seconds:.1f}" if seconds > 0 else "-",
    ]


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."
