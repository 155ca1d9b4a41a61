"""The links of a gang: the processes of one mesh, of which the first tells the others what runs.

The others connect to the first one, twice: one connection carries what they are told, the other
their signs of life, so that each is written by one side alone. Who shows another token, another
configuration or other code is refused by name. A gang lives and dies as a whole: when a connection
ends, or nothing has come for a while, each process that notices says so to its owner, and ends.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import msgspec

from pshare_jax.cluster.gang_door import HELLO_SECONDS, SAY_SECONDS, GangDoor
from pshare_jax.cluster.gang_wire import (
    PROTOCOL,
    Beat,
    Built,
    Compiled,
    Connection,
    Draining,
    End,
    Frame,
    Hello,
    Refused,
    Welcome,
)
from pshare_jax.cluster.secret import split_address
from pshare_jax.cluster.tls import ClusterTls
from pshare_jax.errors import ConfigError, GangLostError
from pshare_jax.runtime.mirror import Run

logger = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
"""Between two signs of life."""

SILENCE_SECONDS = 30.0
"""After this without one a process counts as lost."""

END_SECONDS = 5.0
"""That the others may take to end."""

AGAIN_SECONDS = 0.2
"""Between two attempts to connect to the first process."""


class GangLeader:
    """The side of the first process.

    Args:
        listener: a socket that listens; it is closed once all are there.
        size: processes of the gang, this one included.
        facts: what must be the same in all of them.
        token: of the cluster.
        tls: its certificates.
    """

    def __init__(
        self,
        listener: socket.socket,
        size: int,
        facts: Mapping[str, str],
        token: str = "",
        tls: ClusterTls | None = None,
    ):
        self._size = size
        self._door = GangDoor(listener, size, facts, token, tls)
        self._orders: dict[int, Connection] = {}
        self._lives: dict[int, Connection] = {}
        self._built: dict[int, str] = {}
        self._compiled: dict[int, int] = {}
        self._to_compile = 0
        self._changed = threading.Condition()
        self._ending = threading.Event()
        self._watching: list[threading.Thread] = []

    def gather(self) -> None:
        """Waits until all processes are there."""
        for rank, member in self._door.gather().items():
            self._orders[rank], self._lives[rank] = member.orders, member.life

    def start(
        self,
        coordinator: str,
        on_lost: Callable[[str], None],
        on_drain: Callable[[], None],
    ) -> None:
        """Tells the others where they meet, and watches them from now on.

        Args:
            coordinator: address of the gang's `jax.distributed` world.
            on_lost: called, in a thread, with the reason why the gang is of no use any more.
            on_drain: called, in a thread, when a process is to end in good order.

        Raises:
            GangLostError: one has ended already.
        """
        self.send(Welcome(coordinator))
        for rank, life in self._lives.items():
            self._orders[rank].timeout(SILENCE_SECONDS)
            life.timeout(SILENCE_SECONDS)
            watch = threading.Thread(
                target=self._watch, args=(rank, life, on_lost, on_drain), daemon=True
            )
            watch.start()
            self._watching.append(watch)
        threading.Thread(target=self._beat, args=(on_lost,), daemon=True).start()

    def check_built(self, what: str) -> None:
        """Waits until all have weights and pools, and compares these.

        Raises:
            ConfigError: names who has others.
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self._built) == self._size - 1)
        for rank, there in sorted(self._built.items()):
            if there != what:
                raise ConfigError(
                    f"process {rank} of the gang has other weights or pages than process 0: "
                    f"{there}, not {what}"
                )

    def call(self, run: Run) -> None:
        """Has all others make a call, or compile it.

        Raises:
            GangLostError: one cannot be told.
        """
        self._to_compile += run.compiles
        self.send(run)

    def wait_compiled(self) -> None:
        """Waits until all have compiled what they were to; who is lost is told of by `on_lost`."""
        with self._changed:
            self._changed.wait_for(
                lambda: all(self._compiled.get(r) == self._to_compile for r in self._orders)
            )

    def send(self, frame: Frame) -> None:
        """Tells all others something.

        Raises:
            GangLostError: one cannot be told.
        """
        for rank, orders in self._orders.items():
            try:
                orders.send(frame)
            except GangLostError as error:
                raise GangLostError(f"process {rank} of the gang: {error}") from error

    def close(self) -> None:
        """Lets the others end, when they have run all that they were told, and waits for that."""
        self._ending.set()
        with contextlib.suppress(GangLostError):
            self.send(End())
        end = time.monotonic() + END_SECONDS
        for watch in self._watching:
            watch.join(max(0.0, end - time.monotonic()))
        self._door.close()
        for connection in (*self._orders.values(), *self._lives.values()):
            connection.close()

    def _watch(
        self,
        rank: int,
        life: Connection,
        on_lost: Callable[[str], None],
        on_drain: Callable[[], None],
    ) -> None:
        try:
            while True:
                match life.receive():
                    case Built(what):
                        with self._changed:
                            self._built[rank] = what
                            self._changed.notify_all()
                    case Compiled(count):
                        with self._changed:
                            self._compiled[rank] = count
                            self._changed.notify_all()
                    case Draining():
                        on_drain()
                    case _:
                        pass
        except GangLostError as error:
            if not self._ending.is_set():
                on_lost(f"process {rank} of the gang {error}")

    def _beat(self, on_lost: Callable[[str], None]) -> None:
        try:
            while not self._ending.wait(BEAT_SECONDS):
                self.send(Beat())
        except GangLostError as error:
            # Its signs of life may still come, by the other connection.
            if not self._ending.is_set():
                on_lost(str(error))


class GangFollower:
    """The side of another process.

    Args:
        address: `HOST:PORT` of the first process.
        rank: which one this is, from 1.
        size: processes of the gang.
        facts: what must be the same in all of them.
        token: of the cluster.
        tls: its certificates.

    Attributes:
        coordinator: address of the gang's `jax.distributed` world, once welcome.
    """

    def __init__(
        self,
        address: str,
        rank: int,
        size: int,
        facts: Mapping[str, str],
        token: str = "",
        tls: ClusterTls | None = None,
    ):
        self.coordinator = ""
        self._address = split_address(address)
        self._tls = tls
        self._hello = Hello(
            PROTOCOL, token, rank, size, dict(facts), secrets.randbits(63), life=False
        )
        self._orders: Connection | None = None
        self._life: Connection | None = None
        self._over = threading.Event()
        self._calls: queue.SimpleQueue[Run | End | GangLostError] = queue.SimpleQueue()

    def join(self, on_lost: Callable[[str], None]) -> None:
        """Waits for the first process, and until all are there.

        Args:
            on_lost: called, in a thread, with the reason why the gang is of no use any more.

        Raises:
            ConfigError: this process is refused; says why.
            GangLostError: the first process has ended meanwhile.
        """
        self._orders, self._life = self._connect(life=False), self._connect(life=True)
        # The others may take as long as they like.
        answer = self._orders.receive()
        if isinstance(answer, Refused):
            raise ConfigError(f"process 0 of the gang refuses this one: {answer.why}")
        if not isinstance(answer, Welcome):
            raise GangLostError("process 0 of the gang does not answer as one")
        self.coordinator = answer.coordinator
        self._orders.timeout(SILENCE_SECONDS)
        threading.Thread(target=self._beat, daemon=True).start()
        # Beside whatever computes: who waits for a device that waits for the dead hears of it.
        threading.Thread(target=self._hear, args=(self._orders, on_lost), daemon=True).start()

    def built(self, what: str) -> None:
        """Says that weights and pool are there."""
        self._tell(Built(what))

    def compiled(self, count: int) -> None:
        """Says that so many calls have been compiled."""
        self._tell(Compiled(count))

    def drain(self) -> None:
        """Asks for the gang's end in good order."""
        self._tell(Draining())

    def calls(self) -> Iterator[Run]:
        """What is to be run, until nothing is any more.

        Raises:
            GangLostError: the first process has ended, or says nothing.
        """
        while not isinstance(call := self._calls.get(), End):
            if isinstance(call, GangLostError):
                raise call
            yield call
        self._over.set()

    def close(self) -> None:
        """Ends the connections."""
        self._over.set()
        for connection in (self._orders, self._life):
            if connection is not None:
                connection.close()

    def _hear(self, orders: Connection, on_lost: Callable[[str], None]) -> None:
        try:
            while True:
                frame = orders.receive()
                if isinstance(frame, Run | End):
                    self._calls.put(frame)
                if isinstance(frame, End):
                    return
        except GangLostError as error:
            self._calls.put(error)
            on_lost(f"process 0 of the gang {error}")

    def _tell(self, frame: Frame) -> None:
        assert self._life is not None
        self._life.send(frame)

    def _connect(self, *, life: bool) -> Connection:
        said = time.monotonic()
        while True:
            try:
                return self._say_hello(life=life)
            except (OSError, GangLostError) as error:
                if time.monotonic() - said > SAY_SECONDS:
                    said = time.monotonic()
                    logger.info("waiting for process 0 of the gang: %s", error)
                time.sleep(AGAIN_SECONDS)

    def _say_hello(self, *, life: bool) -> Connection:
        sock = socket.create_connection(self._address, HELLO_SECONDS)
        try:
            if self._tls is not None:
                sock = self._tls.client.wrap_socket(sock)
            connection = Connection(sock)
            connection.send(msgspec.structs.replace(self._hello, life=life))
            sock.settimeout(None)
        except BaseException:
            sock.close()
            raise
        return connection

    def _beat(self) -> None:
        with contextlib.suppress(GangLostError):
            while not self._over.wait(BEAT_SECONDS):
                self._tell(Beat())
