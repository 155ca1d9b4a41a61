"""Text of the sessions: exact lengths, by seed, nothing shared."""

import pytest

from pshare_jax.bench.agents_workload import TextSource, Workload, paragraphs
from pshare_jax.errors import ConfigError


def encode(text: str) -> list[int]:
    return list(text.encode())


def test_text_is_exact_and_decided_by_the_seed():
    first, again = (TextSource(encode, 7, 3) for _ in range(2))
    assert first.take(1000) == again.take(1000)
    assert len(first.take(123)) == 123
    assert again.take(123) != TextSource(encode, 7, 4).take(123)


def test_no_two_sessions_share_a_prefix():
    starts = {
        tuple(TextSource(encode, seed, session).take(8))
        for seed in range(9)
        for session in range(9)
    }
    assert len(starts) == 81


def test_there_is_enough_real_text():
    assert len(paragraphs()) > 300
    assert list(paragraphs()) == sorted(paragraphs())


@pytest.mark.parametrize(
    ("field", "value"), [("models", 0), ("turns", 0), ("observed", -1), ("pause", -0.1)]
)
def test_impossible_shapes_are_named(field, value):
    with pytest.raises(ConfigError, match=f"{field}: must"):
        Workload(**{field: value})
