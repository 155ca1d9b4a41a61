"""Processes that read and write one pool and are killed at every step; run by itself, without JAX.

`python -m tests.attack.kv_store_hammer FOLDER SECONDS SEED` prints what came of it as JSON.

1. One process after the other is killed at the first, second, third ... line of the code that holds
   the books, while it writes and reads; after each the pool must be whole.
2. For the given time several processes write and read at once. Each is killed at a random line of
   the protocol, or at any moment from outside, and replaced.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from pshare_jax.kv.store import books, locking, pool
from tests.kv.store.pools import contents, get, key, open_pool, put

SLOTS, KEYS, WORKERS = 12, 40, 4
PROTOCOL = {books.__file__, pool.__file__, locking.__file__}
READS, WRITES, MISSES, WRONG = range(4)


def die_at(line: int) -> None:
    """Kills this process at the given line of the protocol, counted from now on."""
    left = line

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in PROTOCOL:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def child(body: Callable[[], None]) -> int:
    """Runs `body` in a process of its own, and gives its id."""
    process = os.fork()
    if process:
        return process
    try:
        body()
    finally:
        os._exit(0)
    raise AssertionError


def every_line(folder: Path) -> int:
    """Kills a process at each line in turn; how many lines there were."""
    keeper = open_pool(folder, SLOTS)
    for number in range(SLOTS - 2):
        put(keeper, number)

    def scenario() -> None:
        member = open_pool(folder, SLOTS)
        (pinned,) = member.pin([key(0)])
        assert pinned is not None
        for number in (20, 21, 22):
            put(member, number)
        get(member, 20)
        member.unpin([pinned])

    for line in range(100_000):
        process = child(lambda line=line: (die_at(line), scenario()))  # type: ignore[arg-type,return-value]
        _, status = os.waitpid(process, 0)
        if not os.WIFSIGNALED(status):
            keeper.close()
            return line
        keeper.bury_dead()
        keeper.check()
        counts = keeper.counts()
        assert counts["writing"] == counts["pinned"] == 0, (line, counts)
        for number in (*range(SLOTS - 2), 20, 21, 22):
            found = get(keeper, number)
            right = isinstance(found, np.ndarray) and np.array_equal(found, contents(number))
            assert right or (isinstance(found, str) and found == "missing"), (line, number, found)
        for number in (20, 21):
            (held,) = keeper.holds([key(number)])
            assert held or put(keeper, number), (line, "a key cannot be written any more")
        keeper.drop([key(number) for number in (20, 21, 22)])
        for number in range(SLOTS - 2):
            put(keeper, number)
    raise AssertionError("the scenario does not end")


def work(folder: Path, seed: int, tally: np.ndarray) -> None:
    """Writes and reads until it is killed."""
    rng = random.Random(seed)
    member, buffer = open_pool(folder, SLOTS), None
    expected = {number: contents(number) for number in range(KEYS)}
    if rng.random() < 0.7:
        die_at(int(rng.expovariate(1 / 1500)))
    while True:
        number = rng.randrange(KEYS)
        if rng.random() < 0.4:
            buffer = buffer or member.buffer()
            tally[WRITES] += put(member, number, buffer)
            continue
        found = get(member, number)
        if isinstance(found, str):
            tally[MISSES if found == "missing" else WRONG] += 1
        else:
            tally[READS if np.array_equal(found, expected[number]) else WRONG] += 1


def storm(folder: Path, seconds: float, seed: int) -> dict[str, int]:
    """Several processes at once, killed and replaced; what they have done."""
    rng = random.Random(seed)
    memory = mmap.mmap(-1, 8 * 4 * WORKERS)
    tally = np.frombuffer(memory, np.int64).reshape(WORKERS, 4)
    running: dict[int, int] = {}
    kills, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        for place in set(range(WORKERS)) - set(running.values()):
            seed += 1
            process = child(lambda place=place, seed=seed: work(folder, seed, tally[place]))
            running[process] = place
        time.sleep(rng.random() * 0.1)
        if rng.random() < 0.2:
            os.kill(rng.choice(list(running)), signal.SIGKILL)
        while running:
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                break
            assert os.WIFSIGNALED(status), "a worker has failed"
            kills += 1
            del running[process]
    for process in running:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    reads, writes, misses, wrong = tally.sum(axis=0).tolist()
    return {
        "kills": kills + len(running),
        "reads": reads,
        "writes": writes,
        "misses": misses,
        "wrong": wrong,
    }


def leftovers(folder: Path) -> dict[str, int]:
    """What the dead have left behind, once they are cleaned up after."""
    last = open_pool(folder, SLOTS)
    last.check()
    counts = last.counts()
    for number in range(KEYS):
        if last.holds([key(number)])[0]:
            assert np.array_equal(get(last, number), contents(number)), number
    for number in range(100, 100 + SLOTS):
        assert put(last, number), "a slot is lost"
    buried, rebuilt = last.recoveries()
    last.close()
    return {"lost": counts["writing"] + counts["pinned"], "buried": buried, "rebuilt": rebuilt}


def main(folder: str, seconds: str, seed: str) -> None:
    """See the module."""
    lines = every_line(Path(folder))
    result = {"lines": lines, **storm(Path(folder), float(seconds), int(seed))}
    print(json.dumps({**result, **leftovers(Path(folder))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
