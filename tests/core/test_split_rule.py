"""The split rule: values, a naive implementation beside it, forms, and no JAX in its imports."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pshare_jax.core.split_rule import (
    LAST_TOKEN,
    Invocation,
    LastMessage,
    LastTokens,
    Split,
    SplitRule,
    parse_rule,
)

USER, TOOL = (1, 4093), (1, 19324)


@pytest.mark.parametrize(
    ("length", "count", "covered"), [(10, 1, 9), (10, 3, 7), (3, 3, 0), (2, 5, 0), (1, 1, 0)]
)
def test_last_tokens(length, count, covered):
    assert LastTokens(count).split(list(range(length))) == Split(covered, invoked=True)


@pytest.mark.parametrize(
    ("prompt", "covered"),
    [
        ([*USER, 7, 2, *USER, 8, 9], 4),
        ([*USER, 7, 2, *TOOL, 8, 9], 4),
        ([*TOOL, 7, 2, *USER, 8, 9], 4),
        ([5, *USER], 1),
        ([*USER, 8], 0),
        # Neither is there, whole: a plain text.
        ([7, 4093, 1, 8], 3),
        ([9], 0),
    ],
)
def test_last_message(prompt, covered):
    assert LastMessage((USER, TOOL)).split(prompt) == Split(covered, invoked=True)


@pytest.mark.parametrize(
    ("prompt", "split"),
    [
        ([7, 1, 2, 3, 1, 2, 8], Split(4)),
        ([7, 8, 1, 2], Split(2)),
        ([1, 2, 1, 2], Split(2)),
        ([1, 2], Split(0)),
        ([1, 3, 2, 9], Split(3, invoked=False)),
        ([2], Split(0, invoked=False)),
    ],
)
def test_invocation(prompt, split):
    assert Invocation((1, 2)).split(prompt) == split


def test_an_invocation_may_overlap_itself():
    assert Invocation((3, 3)).split([3, 3, 3, 4]) == Split(1)


@pytest.mark.parametrize("rule", [LastTokens(3), LastMessage((USER,)), Invocation((1, 2))])
def test_an_empty_prompt_is_covered_for_nothing(rule):
    assert rule.split([]).covered == 0


def naive(rule: SplitRule, prompt: list[int]) -> Split:
    """Position by position, from the end."""
    last = max(len(prompt) - 1, 0)
    if isinstance(rule, LastTokens):
        return Split(max(len(prompt) - rule.count, 0))
    wanted = rule.openings if isinstance(rule, LastMessage) else (rule.sequence,)
    for start in reversed(range(len(prompt))):
        if any(tuple(prompt[start : start + len(ids)]) == ids for ids in wanted):
            return Split(start)
    return Split(last, invoked=isinstance(rule, LastMessage))


# Ids of one byte and of several whose bytes look like each other's, shifted.
IDS = st.sampled_from([0, 1, 2, 256, 257, 65536, 65537, 2**24, 2**24 + 1, 2**31 - 1])
SEQUENCES = st.lists(IDS, min_size=1, max_size=3).map(tuple)
RULES = st.one_of(
    st.integers(1, 12).map(LastTokens),
    st.lists(SEQUENCES, min_size=1, max_size=3).map(lambda o: LastMessage(tuple(o))),
    SEQUENCES.map(Invocation),
)


@given(RULES, st.lists(IDS, max_size=12))
@example(Invocation((1,)), [1, 256, 256, 0])
def test_a_split_is_what_a_search_from_the_end_finds(rule, prompt):
    split = rule.split(prompt)
    assert split == naive(rule, prompt)
    assert rule.split(tuple(prompt)) == split
    if prompt:
        assert 0 <= split.covered < len(prompt)


@given(RULES)
def test_rules_survive_json_and_messages(rule):
    assert parse_rule(json.loads(json.dumps(rule.to_json()))) == rule
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(rule), type=SplitRule)
    assert again == rule
    assert hash(again) == hash(rule)


def test_the_forms_of_a_certificate():
    assert LAST_TOKEN.to_json() == 1
    assert LastMessage((USER, TOOL)).to_json() == {"last-message": [[1, 4093], [1, 19324]]}
    assert Invocation((5, 6)).to_json() == {"invocation": [5, 6]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "tail is 0, but a decode module reads at least one prompt token"),
        (-3, "tail is -3"),
        (True, "tail is True"),
        (None, "tail is None, but must be a number of tokens, "),
        ("last-message", "tail is 'last-message', but must be"),
        (1.0, "tail is 1.0, but must be"),
        ([], r"tail is \[\], but must be"),
        ({"last": [[1]]}, "tail is .*'last'.*, but must be"),
        ({"invocation": [1], "last-message": [[1]]}, "but must be"),
        ({"invocation": []}, r"tail: invocation has \(\), which is not a sequence of token ids"),
        ({"invocation": [1, -1]}, r"invocation has \(1, -1\)"),
        ({"invocation": [1, True]}, r"invocation has \(1, True\)"),
        ({"invocation": [2**31]}, "which is not a sequence of token ids"),
        ({"last-message": []}, "needs the token ids that a message begins with"),
        ({"last-message": [[1], []]}, r"last-message has \(\), which is not a sequence"),
        ({"last-message": [1, 2]}, "last-message has 1, which is not a sequence"),
    ],
    ids=str,
)
def test_another_form_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        parse_rule(value)


def test_it_is_imported_without_jax():
    program = """
        import sys

        class NoJax:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("jax", "jaxlib", "flax", "numpy"):
                    raise ImportError(f"{name} is blocked")

        sys.meta_path.insert(0, NoJax())
        from pshare_jax.core.split_rule import LastTokens

        print(LastTokens(2).split([5, 6, 7]).covered)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == ("1\n", "")
