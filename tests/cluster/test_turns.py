"""Turns of several processes at one processor: fair, one at a time, and never waited for long."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pshare_jax.cluster import turns
from pshare_jax.cluster.turns import HostTurns

PIECES = {"prefill": 0.3, "decode": 0.02}
"""Virtual seconds that a piece of each takes."""


class Clock:
    """Goes on only while somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    return tmp_path / "turns"


def test_shares_are_by_weight_and_one_works_at_a_time(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three parts to who has few long pieces, one to who has many short ones."""
    monkeypatch.setattr(turns, "WAIT_SECONDS", 1e9)
    # Pieces take no real time, in which a thread could take the turn that is left to it.
    monkeypatch.setattr(turns, "YIELD_SECONDS", 1e9)
    clock = Clock()
    members = {
        "prefill": HostTurns(path, 3.0, clock),
        "decode": HostTurns(path, 1.0, clock),
    }
    worked = dict.fromkeys(members, 0.0)
    inside: list[str] = []
    apart: list[float] = []
    over = threading.Event()
    ready = threading.Barrier(2)

    def run(name: str) -> None:
        mine = members[name]
        mine._works[mine._me] = 1
        ready.wait()
        while not over.is_set():
            mine.begin()
            inside.append(name)
            assert inside == [name]
            virtual = [member.virtual_seconds for member in members.values()]
            apart.append(max(virtual) - min(virtual))
            clock.now += PIECES[name]
            worked[name] += PIECES[name]
            if clock.now > 60:
                over.set()
            inside.remove(name)
            mine.end()
        mine.rests()

    threads = [threading.Thread(target=run, args=(name,)) for name in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert over.is_set()
    # Nobody is ahead by more than one piece.
    assert max(apart) <= PIECES["prefill"] / 3.0 + 1e-9
    assert abs(worked["prefill"] / 3.0 - worked["decode"]) <= PIECES["prefill"]
    for member in members.values():
        member.close()


def test_who_rested_does_not_make_up_for_it(path: Path) -> None:
    clock = Clock()
    busy, late = HostTurns(path, 1.0, clock), HostTurns(path, 1.0, clock)
    for _ in range(5):
        busy.begin()
        clock.now += 1.0
        busy.end()
    busy.rests()
    assert late.virtual_seconds == 0.0
    late.begin()
    late.end()
    assert late.virtual_seconds == 4.0
    busy.close()
    late.close()


def test_others_know_who_has_work(path: Path) -> None:
    one, two = HostTurns(path, 1.0), HostTurns(path, 1.0)
    assert not one.is_wanted
    two.begin()
    assert one.is_wanted
    assert not two.is_wanted
    two.end()
    assert one.is_wanted, "it may have more"
    two.rests()
    assert not one.is_wanted
    one.close()
    two.close()


def test_a_turn_is_not_left_for_ever_to_who_does_not_take_it(path: Path) -> None:
    """He may have died with work; the others go on, and his place is another's."""
    clock = Clock()
    gone, mine = HostTurns(path, 1.0, clock), HostTurns(path, 1.0, clock)
    gone._works[gone._me] = 1
    mine._virtual[mine._me] = 1.0
    done = threading.Event()

    def work() -> None:
        mine.begin()
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.wait(0.001):
        clock.now += turns.YIELD_SECONDS / 4
    thread.join()
    assert mine._has_turn
    assert not gone._works[gone._me]
    mine.end()
    place = gone._me
    gone.close()
    again = HostTurns(path, 1.0)
    assert again._me == place
    again.close()
    mine.close()


def test_who_is_interrupted_keeps_his_place(path: Path) -> None:
    clock = Clock()
    busy, waits = HostTurns(path, 1.0, clock), HostTurns(path, 1.0, clock)
    assert busy.begin()
    assert not waits.begin(lambda: True)
    assert busy.is_wanted
    clock.now += 1.0
    busy.end()
    # Who has had more leaves the next turn to who waits, though he does something else now.
    assert not busy.begin(lambda: True)
    assert waits.begin(lambda: True)
    waits.end()
    busy.close()
    waits.close()


def test_interruptions_do_not_make_the_wait_longer(path: Path) -> None:
    """Who has the turn may be a process that is stopped."""
    clock = Clock()
    stopped, mine = HostTurns(path, 1.0, clock), HostTurns(path, 1.0, clock)
    assert stopped.begin()
    looks = 0
    while not mine.begin(lambda: True):
        clock.now += turns.WAIT_SECONDS / 8
        looks += 1
    assert looks == 8
    mine.end()
    # The next one is not waited for at all.
    assert mine.begin(lambda: True)
    mine.end()
    stopped.end()
    stopped.close()
    mine.close()


def test_work_that_is_handed_over_is_waited_for(path: Path) -> None:
    """Not for long, and not by who has handed it over."""
    clock = Clock()
    clock.now = 1.0
    one, two = HostTurns(path, 1.0, clock), HostTurns(path, 1.0, clock)
    looks: list[float] = []

    def look() -> bool:
        looks.append(clock.now)
        clock.now += 0.3 * turns.HANDOVER_SECONDS
        return False

    for hands_over, waited in ((True, 4), (False, 0)):
        looks.clear()
        assert one.begin()
        one.end(hands_over=hands_over)
        assert one.begin(look)
        assert not looks
        one.end(hands_over=hands_over)
        one.rests()
        assert two.begin(look)
        assert len(looks) == waited
        two.end()
        two.rests()
    one.close()
    two.close()


def test_who_has_heard_of_it_waits_no_more(path: Path) -> None:
    clock = Clock()
    clock.now = 1.0
    one, two = HostTurns(path, 1.0, clock), HostTurns(path, 1.0, clock)
    assert one.begin()
    one.end(hands_over=True)
    one.rests()
    assert not two.begin(lambda: True)
    assert two.begin(lambda: True)
    two.end()
    one.close()
    two.close()


def test_nobody_waits_long_for_a_process_that_is_stopped(path: Path) -> None:
    """Once; then it is not waited for at all until it goes on."""
    program = (
        "import sys, time\n"
        "from pshare_jax.cluster.turns import HostTurns\n"
        "mine = HostTurns(sys.argv[1], 1.0)\n"
        "mine.begin()\n"
        "print('has it', flush=True)\n"
        "sys.stdin.readline()\n"
        "mine.end()\n"
        "print('gave it', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "has it\n"
        other.send_signal(signal.SIGSTOP)
        clock = Clock()
        mine = HostTurns(path, 1.0, clock)
        done = threading.Event()

        def work() -> None:
            mine.begin()
            done.set()

        thread = threading.Thread(target=work)
        thread.start()
        assert not done.wait(0.01)
        clock.now += turns.WAIT_SECONDS
        assert done.wait(30)
        thread.join()
        assert not mine._has_turn
        mine.end()
        mine.begin()
        assert not mine._has_turn, "at once, though no time has passed"
        mine.end()
        other.send_signal(signal.SIGCONT)
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.stdout.readline() == "gave it\n"
        mine._virtual[mine._me] = 0.0
        mine.begin()
        assert mine._has_turn
        mine.end()
        mine.close()
        other.stdin.write("\n")
        other.stdin.flush()


@pytest.mark.parametrize("what", ["link", "writable by others"])
def test_a_table_that_others_have_put_there_is_not_used(path: Path, what: str) -> None:
    """Its name can be guessed, and a link could lead to any file of this user."""
    target = path.parent / "target"
    target.write_text("mine")
    if what == "link":
        path.symlink_to(target)
    else:
        path.touch()
        path.chmod(0o666)
    with pytest.raises(OSError, match=r"symbolic link|used by others"):
        HostTurns(path, 1.0)
    assert target.read_text() == "mine"
