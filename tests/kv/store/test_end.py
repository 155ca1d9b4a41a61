"""A worker's end: what is dropped, failed or late leaves nothing behind, in whatever order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pshare_jax.core import messages as m
from pshare_jax.core.plans import Load, StorePlan
from pshare_jax.core.prices import SHARED
from pshare_jax.kv.store.end import WorkerEnd

DROP, WANTED, ANSWER = "drop", "is it wanted", "answer"


class Service:
    """Answers loads when the test says so."""

    def load(self, load: Load, keys: list[bytes], wanted: Any, answer: Any) -> None:
        self.wanted, self.answer = wanted, answer


@pytest.mark.parametrize("found", ["it is gone", [np.zeros((1, 1))]], ids=["failed", "found"])
@pytest.mark.parametrize(
    "order",
    [(DROP, WANTED, ANSWER), (WANTED, DROP, ANSWER), (WANTED, ANSWER, DROP)],
    ids=["before", "during", "after"],
)
def test_loads_that_are_dropped(order: tuple[str, ...], found: Any) -> None:
    service, told = Service(), []
    end = WorkerEnd(
        SimpleNamespace(),
        SimpleNamespace(),
        service,
        b"root",
        told.append,  # type: ignore[arg-type]
    )
    end.run(StorePlan(loads=[Load(7, [b"key"], [(1,)], [SHARED])]))
    assert end.num_staged == 1
    for step in order:
        match step:
            case "drop":
                end.run(StorePlan(dropped=[7]))
            case "is it wanted":
                assert service.wanted() is (DROP not in order[: order.index(WANTED)])
            case "answer":
                service.answer(found)
    (answer,) = told
    assert isinstance(answer, m.Loaded)
    if answer.error is None:
        # The core, which does not want it, says so when it hears of it.
        end.run(StorePlan(dropped=[7]))
    assert end.num_staged == 0
