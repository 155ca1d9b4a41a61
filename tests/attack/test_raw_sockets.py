"""What no HTTP client would send: never a 5xx, never a hang, and nothing is left running."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.attack.bounds import SEEDS
from tests.attack.raw_http import exchange, requests, statuses
from tests.serve.server import eventually

REQUESTS = 70


@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_requests(victim, seed):
    rng = random.Random(f"raw {seed}")
    seen: Counter[int] = Counter()
    for index in range(REQUESTS):
        data = requests(rng)
        for status in statuses(exchange(rng, victim.port, data)):
            assert status == 200 or 400 <= status < 500, (index, status, data)
            seen[status] += 1
    # They are near enough to HTTP to come to all parts of the server.
    assert seen[200] >= 5
    assert seen[400] >= 5
    assert len(seen) >= 3
    eventually(lambda: victim.engine.running_ids == [])


def test_the_same_seed_is_the_same_attack():
    first, second = (requests(random.Random("x")) for _ in range(2))
    assert first == second
