"""What `jax.experimental.transfer` does when the other side does not: the figures of decision 016.

    python tests/attack/jax_transfer.py

Two CPU processes over 127.0.0.1 and arrays of 64 MiB. A line each: what was done, what a pull came
to, and the memory (MiB) of the process that offers.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import transfer

COUNT = 16 * 2**20
WAIT_SECONDS = 3.0


def server() -> transfer.TransferServer:
    client = jax.devices()[0].client
    return transfer.start_transfer_server(client, "127.0.0.1:0", ["127.0.0.1:0"])


def wanted() -> list[jax.ShapeDtypeStruct]:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return [jax.ShapeDtypeStruct((COUNT,), jnp.float32, sharding=sharding)]


def memory() -> int:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in s)
    return int(line.split()[1]) // 1024


def outcome(arrays: list[jax.Array]) -> str:
    started = time.monotonic()
    while not arrays[0].is_ready():
        if time.monotonic() - started > WAIT_SECONDS:
            return f"nothing in {WAIT_SECONDS:g} s"
        time.sleep(0.001)
    seconds = time.monotonic() - started
    try:
        jax.block_until_ready(arrays)
    except RuntimeError as error:
        return f"error after {seconds:.3f} s: {str(error)[:60]}"
    return f"there after {seconds:.3f} s"


def offering() -> None:
    """Does what its input says."""
    mine = server()
    print(mine.address(), flush=True)
    for line in sys.stdin:
        what, *numbers = line.split()
        if what == "offer":
            for number in numbers:
                array = jax.block_until_ready(jnp.asarray(np.ones(COUNT, np.float32)) + 1)
                mine.await_pull(int(number), [array])
        elif what == "drain":
            said = outcome(mine.connect(mine.address()).pull(int(numbers[0]), wanted()))
            print(said, flush=True)
            continue
        elif what == "anew":
            del mine
            gc.collect()
            mine = server()
        print(memory(), flush=True)


def pulling(address: str, numbers: list[str]) -> None:
    """Begins to pull, and says so."""
    connection = server().connect(address)
    arrays = [connection.pull(int(number), wanted()) for number in numbers]
    print("pulling", flush=True)
    time.sleep(60)
    del arrays


class Peer:
    """The process that offers."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "offering"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address = self._line()

    def say(self, text: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()
        return self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def throw_garbage(address: str) -> None:
    host, _, port = address.rpartition(":")
    for size in (1, 16, 1000, 100_000):
        with contextlib.suppress(OSError), socket.create_connection((host, int(port))) as sock:
            sock.settimeout(0.3)
            sock.sendall(random.Random(size).randbytes(size))
            sock.recv(100)


def main() -> None:
    peer, connection = Peer(), None
    try:
        print("at rest:", peer.say("look"))
        print("4 offered:", peer.say("offer 0 1 2 3"))
        print("one pulled from itself:", peer.say("drain 0"), peer.say("look"))
        connection = server().connect(peer.address)
        print("one pulled:", outcome(connection.pull(1, wanted())), peer.say("look"))
        print("the same again:", outcome(connection.pull(1, wanted())), peer.say("look"))
        print("a server anew:", peer.say("anew"))
    finally:
        peer.process.kill()
    peer = Peer()
    try:
        peer.say("offer 0 1 2 3 4 5")
        command = [sys.executable, __file__, "pulling", peer.address, *"012345"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as puller:
            assert puller.stdout is not None
            puller.stdout.readline()
            time.sleep(0.02)
            puller.kill()
        time.sleep(0.5)
        print("6 offered, their reader killed:", peer.say("look"), "again:", peer.say("drain 0"))
        throw_garbage(peer.address)
        print("garbage at its port:", peer.say("offer 7"), peer.process.poll())
        connection = server().connect(peer.address)
        print("and then:", outcome(connection.pull(7, wanted())))
        peer.process.kill()
        print("killed:", outcome(connection.pull(8, wanted())))
    finally:
        peer.process.kill()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["offering"]:
            offering()
        case ["pulling", address, *numbers]:
            pulling(address, numbers)
        case _:
            main()
