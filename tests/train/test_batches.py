"""The order of training is a function of the seed, complete, and can be entered anywhere."""

import numpy as np

from pshare_jax.core.split_rule import LAST_TOKEN
from pshare_jax.train.batches import BatchStream, MicroBatch, group_steps, make_plan
from pshare_jax.train.buckets import choose_buckets
from pshare_jax.train.data import Example, Turn
from pshare_jax.train.layout import make_row

ROWS = [
    make_row(Example(np.arange(n, dtype=np.int32), (Turn(n - 2, n),), "file:1"), LAST_TOKEN)
    for n in [5, 40, 7, 6, 41, 42, 8, 9, 10, 43, 11]
]
BUCKETS, ASSIGNED = choose_buckets(ROWS, 2)


def plan(seed=0, epochs=2, max_steps=0, batch_size=4):
    return make_plan(
        BUCKETS,
        ASSIGNED,
        micro_batch_size=2,
        batch_size=batch_size,
        epochs=epochs,
        max_steps=max_steps,
        seed=seed,
    )


def rows_of(steps):
    return [row for step in steps for micro in step for row in micro.rows]


def test_every_epoch_has_every_row_once_in_an_order_of_its_own():
    whole = plan()
    first, second = (
        rows_of(steps)
        for steps in (whole.steps[: whole.steps_per_epoch], whole.steps[whole.steps_per_epoch :])
    )
    assert sorted(first) == sorted(second) == list(range(len(ROWS)))
    assert first != second
    assert rows_of(plan().steps) == first + second
    assert rows_of(plan(seed=1).steps) != first + second


def test_micro_batches_have_one_shape_and_steps_their_number():
    whole = plan()
    for step in whole.steps:
        for micro in step:
            assert {BUCKETS[ASSIGNED[row]] for row in micro.rows} == {micro.bucket}
            assert len(micro.rows) <= 2


def test_steps_are_full_but_for_an_epochs_last():
    """What is left of each bucket shares steps: none of a single row moves the weights as far."""
    for batch_size in (2, 4, 6):
        whole = plan(batch_size=batch_size)
        epoch = [sum(len(m.rows) for m in s) for s in whole.steps[: whole.steps_per_epoch]]
        assert sum(epoch) == len(ROWS)
        assert set(epoch[:-1]) == {batch_size}
        assert epoch[-1] == (len(ROWS) % batch_size or batch_size)


def test_a_step_cuts_what_it_cannot_hold():
    bucket = BUCKETS[0]
    micro = [MicroBatch(bucket, (0, 1, 2)), MicroBatch(bucket, (3, 4, 5)), MicroBatch(bucket, (6,))]
    steps = group_steps(micro, 4)
    assert [[m.rows for m in step] for step in steps] == [[(0, 1, 2), (3,)], [(4, 5), (6,)]]


def test_max_steps_ends_early_or_not_at_all():
    assert plan(max_steps=3).steps == plan().steps[:3]
    assert plan(max_steps=999).steps == plan().steps


def stream(whole):
    return BatchStream(whole, ROWS, 2, teacher=False, load_kv=None)


def test_a_stream_can_be_entered_at_any_step():
    whole = plan()
    from_start = stream(whole)
    batches = [next(from_start) for step in whole.steps for _ in step]
    entered = stream(whole)
    entered.seek(whole.first_micro_batch(3))
    rest = batches[sum(len(step) for step in whole.steps[:3]) :]
    for expected in rest:
        batch = next(entered)
        assert all(np.array_equal(batch[name], expected[name]) for name in expected)
