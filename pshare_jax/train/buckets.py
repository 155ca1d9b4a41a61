"""The few shapes that rows are padded to.

Each shape is compiled once, and padding is computed like everything else. Lengths have long tails:
groups of equal size would pad most rows to a few long ones. So the shapes are found by merging,
from one shape for each kind of row, always the two whose merging pads least.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from pshare_jax.train.layout import Row

_PROMPT_MULTIPLE = 16
_DECODE_MULTIPLE = 4
DECODE_COST = 10
"""What a decode token costs, in prompt tokens. It goes forward and backward through the model; of
the prompt there is mostly KV already, which is only looked at."""
# Rows whose lengths differ by less than such a factor are of a kind: the smallest that makes few
# enough kinds, since each is compared with each.
_GROWTHS = (1.12, 1.25, 1.5, 2.0, 4.0)
_MOST_KINDS = 400
# Fewer shapes than allowed are used where they waste no more than this share of the cost.
_SMALL_WASTE = 0.2


class Bucket(NamedTuple):
    """A shape that rows are padded to: prompt, decode, target and sequence tokens."""

    prompt: int
    decode: int
    targets: int
    sequence: int


class Use(NamedTuple):
    """Shares of the slots of all rows that hold a token, 0 to 1."""

    prompt: float
    decode: float


def choose_buckets(
    rows: Sequence[Row], count: int, decode_cost: float = DECODE_COST
) -> tuple[list[Bucket], np.ndarray]:
    """At most `count` shapes for `rows`, and the index of each row's.

    Depends on the arguments alone, so that a run that goes on has the same.

    Args:
        rows: what is to be padded.
        count: most shapes.
        decode_cost: of a decode token, in prompt tokens; 0 where prompts alone are computed.
    """
    sizes = np.array(
        [(len(r.prompt), len(r.tokens), len(r.targets), len(r.sequence)) for r in rows], np.int64
    ).reshape(-1, 4)
    kinds, kind_of_row = _kinds(sizes[:, :2])
    shapes = np.zeros((len(kinds), 4), np.int64)
    np.maximum.at(shapes, kind_of_row, sizes)
    shapes = _rounded_up(shapes)
    numbers = np.bincount(kind_of_row, minlength=len(kinds))
    weights = np.array([1.0, decode_cost, 0.0, 0.0])
    group_of_kind = _merge(shapes, numbers, count, weights, float((sizes @ weights).sum()))
    groups, assigned = np.unique(group_of_kind[kind_of_row], return_inverse=True)
    merged = [shapes[group_of_kind == group].max(axis=0) for group in groups]
    return [Bucket(*map(int, shape)) for shape in merged], assigned.ravel()


def slots_used(rows: Sequence[Row], buckets: Sequence[Bucket], assigned: np.ndarray) -> Use:
    """How much of the padded rows is not padding; 1 where there are no slots."""
    prompt = sum(buckets[b].prompt for b in assigned)
    decode = sum(buckets[b].decode for b in assigned)
    return Use(
        sum(len(row.prompt) for row in rows) / prompt if prompt else 1.0,
        sum(len(row.tokens) for row in rows) / decode if decode else 1.0,
    )


def _kinds(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups lengths `[rows, 2]` that differ little: the kinds, and each row's."""
    *finer, coarsest = _GROWTHS
    for growth in finer:
        kinds, of_row = _grouped(lengths, growth)
        if len(kinds) <= _MOST_KINDS:
            return kinds, of_row
    return _grouped(lengths, coarsest)


def _grouped(lengths: np.ndarray, growth: float) -> tuple[np.ndarray, np.ndarray]:
    kinds, of_row = np.unique(_steps(lengths, growth), axis=0, return_inverse=True)
    return kinds, of_row.ravel()


def _steps(lengths: np.ndarray, growth: float) -> np.ndarray:
    """Lengths `[rows, 2]` as steps of a geometric scale."""
    least = np.array([_PROMPT_MULTIPLE, _DECODE_MULTIPLE])
    scaled = np.maximum(lengths / least, 1.0)
    steps = np.ceil(np.log(scaled) / np.log(growth) - 1e-9).astype(np.int64)
    return np.where(lengths == 0, -1, steps)


def _rounded_up(shapes: np.ndarray) -> np.ndarray:
    multiples = np.array([_PROMPT_MULTIPLE, _DECODE_MULTIPLE, _DECODE_MULTIPLE, _PROMPT_MULTIPLE])
    return -(-shapes // multiples) * multiples


def _merge(
    shapes: np.ndarray, numbers: np.ndarray, count: int, weights: np.ndarray, needed: float
) -> np.ndarray:
    """Which kinds share a shape: `[kinds]`, the number of the group that each is in.

    Args:
        shapes: `[kinds, 4]`: the smallest shape of each kind.
        numbers: `[kinds]`: how many rows it has.
        count: most groups.
        weights: `[4]`: what a slot of each kind costs.
        needed: the cost of all rows without padding; merging goes on below `count` while padding
            adds little to it.
    """
    groups = np.arange(len(shapes))
    alive = list(range(len(shapes)))
    shapes, numbers = shapes.copy(), numbers.astype(np.float64)
    # Of merging each two: what padding it adds. The diagonal and what is merged never win.
    added = np.full((len(shapes), len(shapes)), np.inf)
    for i in alive:
        _price(added, i, np.array(alive[i + 1 :], np.int64), shapes, numbers, weights)
    total = float((numbers * (shapes @ weights)).sum())
    while len(alive) > 1:
        i, j = (int(k) for k in np.unravel_index(added.argmin(), added.shape))
        allowed = needed / (1 - _SMALL_WASTE)
        if len(alive) <= count and total + added[i, j] > allowed:
            break
        total += added[i, j]
        shapes[i] = np.maximum(shapes[i], shapes[j])
        numbers[i] += numbers[j]
        groups[groups == j] = i
        alive.remove(j)
        added[j, :] = added[:, j] = np.inf
        others = np.array([k for k in alive if k != i], np.int64)
        _price(added, i, others, shapes, numbers, weights)
    return groups


def _price(
    added: np.ndarray,
    i: int,
    others: np.ndarray,
    shapes: np.ndarray,
    numbers: np.ndarray,
    weights: np.ndarray,
) -> None:
    """Writes into `added` what merging `i` with each of `others` would add."""
    if not len(others):
        return
    both = np.maximum(shapes[i], shapes[others]) @ weights
    apart = numbers[i] * (shapes[i] @ weights) + numbers[others] * (shapes[others] @ weights)
    price = (numbers[i] + numbers[others]) * both - apart
    added[np.minimum(i, others), np.maximum(i, others)] = price
