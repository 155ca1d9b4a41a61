"""Python's lock while modules are loaded."""

from __future__ import annotations

import sys

import pytest

from pshare_jax.engine.gil import SWITCH_SECONDS, handing_on


def test_the_lock_is_handed_on_sooner_for_a_while():
    before = sys.getswitchinterval()
    with handing_on():
        assert sys.getswitchinterval() == pytest.approx(min(before, SWITCH_SECONDS))
    assert sys.getswitchinterval() == before
    with pytest.raises(ZeroDivisionError), handing_on():
        divmod(1, 0)
    assert sys.getswitchinterval() == before
