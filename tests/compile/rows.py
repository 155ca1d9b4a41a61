"""Which cases are compiled for which machines: all kinds of both, but not the whole product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

EVERY_CASE = ("v6e:2x4", "h100")
IN_TURN = ("v5e:2x4", "tpu7x:2x2x1", "v5p:2x2x1")
"""Other TPUs: one compiler and one kernel, other tiles. Each case goes to one of them."""


def spread(cases: Sequence[Any]) -> list[Any]:
    """Parameters `(machine, case)`."""
    pairs = [(name, case) for name in EVERY_CASE for case in cases]
    pairs += [(IN_TURN[i % len(IN_TURN)], case) for i, case in enumerate(cases)]
    return [pytest.param(name, case, id=f"{name}-{case}") for name, case in pairs]
