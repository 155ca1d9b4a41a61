"""Work in threads of little priority."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from pshare_jax.engine.quietly import NICENESS, SWITCH_SECONDS, handing_on, quietly


def priority() -> tuple[str, int]:
    number = threading.get_native_id() if sys.platform == "linux" else 0
    return threading.current_thread().name, os.getpriority(os.PRIO_PROCESS, number)


def test_it_runs_in_a_thread_of_little_priority():
    before = priority()
    name, niceness = quietly(priority)
    assert name == "quiet"
    if sys.platform == "linux":
        assert niceness == max(NICENESS, before[1])
    assert priority() == before


def test_what_it_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        quietly(divmod, 1, 0)
    assert quietly(divmod, 7, 2) == (3, 1)


def test_the_interpreter_is_handed_on_sooner_for_a_while():
    before = sys.getswitchinterval()
    with handing_on():
        assert sys.getswitchinterval() == pytest.approx(min(before, SWITCH_SECONDS))
    assert sys.getswitchinterval() == before
    with pytest.raises(ZeroDivisionError), handing_on():
        divmod(1, 0)
    assert sys.getswitchinterval() == before
