"""One evaluation: answers from a back-end, graded while others are generated."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from pshare_jax.evals import sandbox
from pshare_jax.evals.backend import Answer, Backend, Sampling
from pshare_jax.evals.grading import grade
from pshare_jax.evals.items import Item
from pshare_jax.evals.results import accuracy
from pshare_jax.evals.verdict import Grade

_PACKAGES = ("pshare_jax", "jax", "jaxlib", "numpy", "transformers", "tokenizers", "aiohttp")

Report = Callable[[int, int], None]
"""Called with how many answers are graded and how many of them are right."""


def evaluate(
    backend: Backend,
    items: Sequence[Item],
    sampling: Sampling,
    *,
    grading_processes: int | None = None,
    report: Report = lambda graded, correct: None,
) -> dict[str, Any]:
    """Answers and grades `items`.

    Args:
        backend: what generates.
        items: at least one.
        sampling: how.
        grading_processes: programs that are run at once; half of the processor cores unless given.
        report: shows how far it is.

    Returns:
        The part of a result that follows from them, as JSON: `backend`, `sampling`, `versions`,
        `started` (UTC), `seconds` and `generation_seconds`, `prompt_tokens`, `completion_tokens`
        and `tokens_per_second` (generated ones, over the time of generation; these are None when a
        server does not tell), what `results.accuracy` gives, and `answers` in the order of `items`.

    Raises:
        EvaluationError: an item cannot be answered, or the sandbox does not work.
    """
    described = backend.describe()
    if any(item.kind == "code" for item in items):
        sandbox.check()
    answers: dict[int, Answer] = {}
    grades: dict[int, Future[Grade]] = {}
    counter = _Counter(report)
    workers = grading_processes or max(1, (os.cpu_count() or 1) // 2)
    # Each of its threads waits for a process that runs a program.
    with ThreadPoolExecutor(workers) as programs:

        def on_answer(index: int, answer: Answer) -> None:
            answers[index] = answer
            if items[index].kind == "code":
                future = programs.submit(grade, items[index], answer.text)
            else:
                future = Future[Grade]()
                future.set_result(grade(items[index], answer.text))
            grades[index] = future
            future.add_done_callback(counter.count)

        started, wall = datetime.now(UTC), time.perf_counter()
        try:
            backend.answer(items, sampling, on_answer)
            generated = time.perf_counter() - wall
            ordered = [grades[index].result() for index in range(len(items))]
        except BaseException:
            programs.shutdown(wait=False, cancel_futures=True)
            raise
        seconds = time.perf_counter() - wall
    prompt, completion = (
        _total([getattr(answers[index], name) for index in range(len(items))])
        for name in ("prompt_tokens", "completion_tokens")
    )
    return {
        "backend": described,
        "sampling": asdict(sampling),
        "versions": _versions(),
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "generation_seconds": round(generated, 3),
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "tokens_per_second": None if completion is None else round(completion / generated, 2),
        **accuracy([grade.correct for grade in ordered]),
        "answers": [
            _entry(item, answers[index], ordered[index]) for index, item in enumerate(items)
        ],
    }


class _Counter:
    """Counts grades, whatever thread they come from."""

    def __init__(self, report: Report):
        self._report = report
        self._lock = threading.Lock()
        self._graded = self._correct = 0

    def count(self, future: Future[Grade]) -> None:
        if future.cancelled() or future.exception() is not None:
            return
        with self._lock:
            self._graded += 1
            self._correct += future.result().correct
            self._report(self._graded, self._correct)


def _entry(item: Item, answer: Answer, verdict: Grade) -> dict[str, Any]:
    return {
        "id": item.id,
        "correct": verdict.correct,
        "detail": verdict.detail,
        "output": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
    }


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **packages}
