"""What one tenant learns of another's prompts from its own usage, with the engine's own cores."""

from __future__ import annotations

import pytest

from pshare_jax.serve.api_keys import ANONYMOUS, ApiKey
from tests.core.scripted import Host
from tests.core.setting import PAGE, Setting

ALICE, MALLORY = ApiKey("alice", tenant="key/alice"), ApiKey("mallory", tenant="key/mallory")
GROUP = ApiKey("bob", tenant="group/team"), ApiKey("carol", tenant="group/team")
BEFORE = [ord(c) for c in "the code is "]
DIGITS = 6


def attack(victim: ApiKey, spy: ApiKey, secret: list[int]) -> list[tuple[int, int, int]]:
    """What the spy is told while it guesses digit by digit: computed, cached and shared tokens.

    A prompt's half-filled last page is matched token by token, so that a guess that is right up to
    one more digit finds one more token in the cache.
    """
    host = Host(Setting(prefill_pages=200, decode_pages=200))
    host.submit("lora", [*BEFORE, *secret, 1], 1, salt=victim.cache_salt(""))
    host.drain()
    told, known = [], []
    for _ in range(DIGITS):
        best = (-1, 0)
        for digit in range(10):
            guess = host.submit(
                "full", [*BEFORE, *known, digit, *[2] * PAGE * 2], 1, salt=spy.cache_salt("")
            )
            host.drain()
            assert guess.usage is not None
            usage = guess.usage
            told.append((usage.computed_tokens, usage.cached_tokens, usage.shared_tokens))
            best = max(best, (usage.cached_tokens, digit))
        known.append(best[1])
    return told


SECRETS = [2, 7, 1, 8, 2, 8], [9, 0, 4, 5, 1, 3]


def test_the_usage_of_a_tenant_holds_nothing_of_anothers_secret() -> None:
    one, other = (attack(ALICE, MALLORY, secret) for secret in SECRETS)
    assert one == other
    assert all(shared == 0 for _, _, shared in one), "its own guesses are all by one model"


@pytest.mark.parametrize(("victim", "spy"), [(ANONYMOUS, ANONYMOUS), GROUP])
def test_within_a_tenant_it_does(victim: ApiKey, spy: ApiKey) -> None:
    """So the test above sees what there is to see; keys of a group trust each other."""
    one, other = (attack(victim, spy, secret) for secret in SECRETS)
    assert one != other
