"""What a traced step consists of: loops, and what runs on one thread between them."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pshare_jax.kernels.native.loop_trace import Call
from pshare_jax.models.config import ModelConfig

_LAST_STAGE = "head"
_BYTES = 2  # of a bfloat16


@dataclass(frozen=True)
class Step:
    """A step that was traced on one thread.

    Args:
        calls: of kernels, in order.
        wall: seconds that it took.
        cpu: seconds of all threads of the process.
    """

    calls: Sequence[Call]
    wall: float
    cpu: float

    @property
    def inside(self) -> float:
        """Seconds in kernels."""
        return sum(call.end - call.begin for call in self.calls)


@dataclass(frozen=True)
class Group:
    """Loops of a step that are alike: median seconds of each iteration, and how many a step."""

    iterations: np.ndarray
    times: float


@dataclass(frozen=True)
class Parts:
    """Median seconds of a step.

    Args:
        loops: by stage and number of iterations.
        cpp: in kernels, between loops.
        xla: between the calls of a step.
        gap: between a step and the next one.
        host: processor time outside of kernels, some of it while they run.
    """

    loops: dict[tuple[str, int], Group]
    cpp: float
    xla: float
    gap: float
    host: float


def steps_of(calls: Sequence[Call], cpu: float) -> list[Step]:
    """Whole decode steps among the calls of a window; each ends with its head.

    Args:
        calls: of a window.
        cpu: processor time of the process in it, in seconds.
    """
    stages = [{loop.stage for loop in call.loops} for call in calls]
    ends = [i for i, found in enumerate(stages) if _LAST_STAGE in found]
    share = cpu / max(1, len(ends))
    return [
        Step(calls[first + 1 : last + 1], calls[last].end - calls[first].end, share)
        for first, last in itertools.pairwise(ends)
    ]


def parts_of(steps: Sequence[Step]) -> Parts:
    """Medians over steps."""
    found: defaultdict[tuple[str, int], list[np.ndarray]] = defaultdict(list)
    for step in steps:
        for call in step.calls:
            for loop in call.loops:
                found[loop.stage, len(loop.seconds)].append(loop.seconds)
    loops = {
        key: Group(np.median(seconds, axis=0), len(seconds) / len(steps))
        for key, seconds in found.items()
    }
    return Parts(
        loops,
        cpp=_median(steps, lambda s: s.inside - _in_loops(s)),
        xla=_median(steps, lambda s: s.calls[-1].end - s.calls[0].begin - s.inside),
        gap=_median(steps, lambda s: s.wall - (s.calls[-1].end - s.calls[0].begin)),
        host=_median(steps, lambda s: max(0.0, s.cpu - s.inside)),
    )


def _in_loops(step: Step) -> float:
    return sum(loop.end - loop.begin for call in step.calls for loop in call.loops)


def _median(steps: Sequence[Step], figure: Callable[[Step], float]) -> float:
    return float(np.median([figure(step) for step in steps]))


def step_bytes(model: ModelConfig, rows: int, context: int) -> dict[str, float]:
    """Bytes that a loop of each stage reads from memory: weights in bfloat16, and KV of `rows`.

    Of experts nothing is known: which are read depends on the tokens.
    """
    heads, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    embed = model.hidden_size * _BYTES
    read = {
        "q, k, v": (heads + 2 * kv) * embed,
        "attention's output": heads * embed,
        "attention": 2 * kv * rows * context * _BYTES,
        "head": model.vocab_size * embed,
    }
    if not model.has_experts:
        read |= {
            "gate and up": 2 * model.intermediate_size * embed,
            "down": model.intermediate_size * embed,
        }
    return {stage: float(count) for stage, count in read.items()}
