"""Few shapes that waste little, also where lengths have a long tail."""

import numpy as np
import pytest

from pshare_jax.core.split_rule import LastTokens
from pshare_jax.train import buckets
from pshare_jax.train.buckets import Bucket, choose_buckets, slots_used
from pshare_jax.train.config import DataConfig
from pshare_jax.train.data import Example, Turn
from pshare_jax.train.layout import Row, make_row

MOST = DataConfig().buckets


def row(prompt: int, answer: int, tail: int = 1) -> Row:
    """`prompt` tokens and `answer` more."""
    tokens = np.zeros(prompt + answer, np.int32)
    return make_row(Example(tokens, (Turn(prompt, prompt + answer),), "file:1"), LastTokens(tail))


def assert_hold(rows, shapes, assigned):
    for one, index in zip(rows, assigned, strict=True):
        bucket = shapes[index]
        sizes = (len(one.prompt), len(one.tokens), len(one.targets), len(one.sequence))
        assert all(size <= limit for size, limit in zip(sizes, bucket, strict=True))


def test_rows_of_like_lengths_share_a_shape():
    rows = [row(n // 2, n - n // 2) for n in (8, 90, 10, 86, 12, 88)]
    shapes, assigned = choose_buckets(rows, 2)
    assert len(shapes) == 2
    assert assigned[0] == assigned[2] == assigned[4] != assigned[1] == assigned[3] == assigned[5]
    assert_hold(rows, shapes, assigned)
    assert choose_buckets(rows[:1], 3)[0] == [Bucket(16, 4, 4, 16)]


def test_no_more_shapes_than_pay():
    rows = [row(60 + i % 5, 20 + i % 3) for i in range(50)]
    assert len(choose_buckets(rows, MOST)[0]) == 1


@pytest.mark.parametrize("sigma", [0.8, 1.0, 1.2], ids=str)
@pytest.mark.parametrize("tail", [1, 32], ids=str)
def test_long_tails_leave_most_slots_in_use(sigma, tail):
    """Three groups of equal size used 21 % of decode slots and 39 % of prompt slots."""
    rng = np.random.default_rng(0)
    answers = np.clip(np.exp(rng.normal(np.log(60), sigma, 2000)), 4, 1000).astype(int)
    prompts = np.clip(np.exp(rng.normal(np.log(200), sigma, 2000)), 8, 1800).astype(int)
    rows = [row(p, a, tail) for p, a in zip(prompts, answers, strict=True)]
    shapes, assigned = choose_buckets(rows, MOST)
    assert len(shapes) <= MOST
    assert_hold(rows, shapes, assigned)
    assert slots_used(rows, shapes, assigned).decode >= 0.6
    # The KV of prompts is computed once, in shapes of its own.
    shapes, assigned = choose_buckets(rows, MOST, decode_cost=0)
    assert_hold(rows, shapes, assigned)
    assert slots_used(rows, shapes, assigned).prompt >= 0.75


def test_many_kinds_of_rows_do_not_take_long():
    """Each kind is compared with each: there are few, however many lengths there are."""
    rng = np.random.default_rng(1)
    sizes = np.exp(rng.uniform(1, 11, (3000, 2))).astype(int) + 1
    kinds, of_row = buckets._kinds(sizes)
    assert len(kinds) <= buckets._MOST_KINDS
    assert of_row.shape == (3000,)
    assert of_row.max() == len(kinds) - 1


def test_they_depend_on_the_rows_alone():
    rows = [row(p, a) for p, a in ((5, 9), (100, 3), (40, 40), (7, 200), (6, 8))]
    (one, first), (two, second) = choose_buckets(rows, 3), choose_buckets(list(rows), 3)
    assert one == two
    assert first.tolist() == second.tolist()
