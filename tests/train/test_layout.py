"""The split rule as rows and batches."""

import numpy as np
import pytest

from pshare_jax.core.split_rule import Invocation, LastMessage, LastTokens
from pshare_jax.train.buckets import Bucket
from pshare_jax.train.data import Example, Turn
from pshare_jax.train.layout import collate, make_row


def example(length: int, *turns: tuple[int, int]) -> Example:
    return Example(
        np.arange(100, 100 + length, dtype=np.int32), tuple(Turn(*t) for t in turns), "file:1"
    )


TWO_TURNS = example(12, (4, 6), (9, 12))


def test_tail_1_is_the_papers_split():
    row = make_row(example(6, (4, 6)), LastTokens(1))
    assert row.prompt.tolist() == [100, 101, 102]
    assert row.tokens.tolist() == [103, 104]
    assert row.positions.tolist() == [3, 4]
    assert row.covers.tolist() == [3, 3]
    assert row.tokens[row.targets].tolist() == [103, 104]
    assert row.labels.tolist() == [104, 105]


def test_each_turn_is_a_segment_over_the_kv_before_it():
    row = make_row(TWO_TURNS, LastTokens(2))
    assert row.prompt.tolist() == [100, 101, 102, 103, 104, 105, 106]
    assert row.positions.tolist() == [2, 3, 4, 7, 8, 9, 10]
    assert row.segments.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert row.covers.tolist() == [2, 2, 2, 7, 7, 7, 7]
    assert row.positions[row.targets].tolist() == [3, 4, 8, 9, 10]
    assert row.labels.tolist() == [104, 105, 109, 110, 111]


def test_a_tail_longer_than_the_gap_repeats_positions():
    row = make_row(TWO_TURNS, LastTokens(6))
    assert row.positions.tolist() == [*range(5), *range(3, 11)]
    assert row.covers.tolist() == [0] * 5 + [3] * 8
    assert row.labels.tolist() == [104, 105, 109, 110, 111]


def test_ordinary_fine_tuning_reads_everything_itself():
    row = make_row(TWO_TURNS, rule=None)
    assert row.prompt.tolist() == []
    assert row.positions.tolist() == list(range(11))
    assert set(row.segments.tolist()) == set(row.covers.tolist()) == {0}
    assert row.targets.tolist() == row.sequence_targets.tolist() == [3, 4, 8, 9, 10]


RULES = [
    LastTokens(1),
    LastTokens(3),
    # In the prompt of the first turn, of both, of the second, of none.
    LastMessage(((101, 102),)),
    LastMessage(((101, 102), (106,))),
    LastMessage(((106, 107),)),
    LastMessage(((99,),)),
    Invocation((102,)),
    Invocation((101, 102, 103)),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_each_turn_is_split_as_its_prompt_is_served(rule):
    row = make_row(TWO_TURNS, rule)
    end = 0
    for segment, turn in enumerate(TWO_TURNS.turns):
        prompt = TWO_TURNS.tokens[: turn.start].tolist()
        covered = rule.split(prompt).covered
        mine = row.segments == segment
        assert row.positions[mine].tolist() == list(range(covered, turn.end - 1))
        assert set(row.covers[mine].tolist()) == {covered}
        assert len(row.prompt) >= covered
        # The loss is over the answer, whatever the rule.
        end += mine.sum()
        targets = row.targets[(row.targets < end) & (row.targets >= end - mine.sum())]
        assert row.positions[targets].tolist() == list(range(turn.start - 1, turn.end - 1))
    assert row.prompt.tolist() == TWO_TURNS.tokens[: max(row.covers)].tolist()


def test_a_message_that_opens_across_a_turn_keeps_the_cover_of_the_earlier_one():
    """A later prompt may split before an earlier one did: all that is covered is in the row."""
    row = make_row(example(8, (4, 5), (6, 8)), LastMessage(((102, 103, 104),)))
    assert row.covers.tolist() == [3, *[2] * 5]
    assert row.prompt.tolist() == [100, 101, 102]


@pytest.mark.parametrize("rule", [*RULES, None], ids=str)
def test_the_token_after_every_target_is_its_label(rule):
    row = make_row(TWO_TURNS, rule)
    after = TWO_TURNS.tokens[row.positions[row.targets] + 1]
    assert after.tolist() == row.labels.tolist()
    assert TWO_TURNS.tokens[row.sequence_targets + 1].tolist() == row.labels.tolist()


def test_padding_weighs_nothing():
    rows = [make_row(TWO_TURNS, LastTokens(2))]
    batch = collate(rows, Bucket(16, 8, 8, 16), 2, teacher=True)
    assert {name: array.shape for name, array in batch.items()} == {
        "prompt": (2, 16),
        **dict.fromkeys(("tokens", "positions", "segments", "covers"), (2, 8)),
        **dict.fromkeys(("targets", "labels", "weights", "sequence_targets"), (2, 8)),
        "sequence": (2, 16),
    }
    assert batch["weights"].tolist() == [[1.0] * 5 + [0.0] * 3, [0.0] * 8]
    assert (batch["segments"][0, 7:] == -1).all()
    assert (batch["segments"][1] == -1).all()
