"""Full modules of one decode engine: rows of a module are stepped together, and none starves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import pytest

from pshare_jax.config import DecodeConfig
from pshare_jax.core.plans import DecodePlan, Landed
from tests.engine.harness import Models, running, serve_config, wait_until
from tests.helpers import tiny_config

QUANTUM = 6


@pytest.fixture(scope="module")
def two() -> Models:
    models = Models(tiny_config())
    models.add_full("one", 1)
    models.add_full("other", 2)
    return models


def test_rows_of_a_module_are_stepped_together_and_none_starves(
    two: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = DecodeConfig(
        batch_buckets=[4], replay_buckets=[4], num_pages=60, group_quantum=QUANTUM
    )
    prompts = [[3 + i, 5, 7 + i] for i in range(3)]
    steps: list[tuple[str, int]] = []
    with running(two, serve_config(decode=decode)) as client:
        [worker] = client.engine.workers.decode
        plain = worker.executor.begin

        def begin(plan: DecodePlan) -> list[Landed]:
            if plan.step is not None:
                steps.append((plan.step.group.removeprefix("full/"), len(plan.step.rows)))
            return plain(plan)

        monkeypatch.setattr(worker.executor, "begin", begin)
        long = client.submit("one", [1, 2, 3], 120)
        wait_until(lambda: len(steps) > 2)
        short = [client.submit("other", prompt, 30) for prompt in prompts]
        replies = [reply.wait() for reply in short]
        assert long.wait().tokens == two.expected("one", [1, 2, 3], 120)
    for reply, prompt in zip(replies, prompts, strict=True):
        assert reply.tokens == two.expected("other", prompt, 30)
    _check(steps)


def _check(steps: Sequence[tuple[str, int]]) -> None:
    names = [name for name, _ in steps]
    first, last = names.index("other"), len(names) - names[::-1].index("other")
    both = steps[first:last]
    # While both have rows the three wait for a turn of the one, and it for three of theirs.
    turns = [(name, len(list(run))) for name, run in groupby(name for name, _ in both)]
    assert max(length for name, length in turns if name == "one") == QUANTUM
    assert QUANTUM <= max(length for name, length in turns if name == "other") <= 4 * QUANTUM
    # The three short ones have come together: far fewer steps than their 90 tokens.
    assert sum(name == "other" for name in names) < 45
