"""What the processes of a gang say to each other: frames over plain streams, see `cluster.gang`."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

import msgspec

from pshare_jax.errors import GangLostError
from pshare_jax.runtime.mirror import Run

PROTOCOL = 1

_KEEPALIVE = {socket.TCP_KEEPIDLE: 15, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}
_HEADER = struct.Struct(">Q")


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """Who connects: `facts` must be the same in all processes; `life` is what the connection is
    for, and `incarnation` the same random number on both connections of a process."""

    protocol: int
    token: str
    rank: int
    size: int
    facts: dict[str, str]
    incarnation: int
    life: bool


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag="welcome"):
    """All are there; `coordinator` is the address of their `jax.distributed` world."""

    coordinator: str


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """Says why."""

    why: str


class Beat(msgspec.Struct, frozen=True, array_like=True, tag="beat"):
    """A sign of life."""


class Built(msgspec.Struct, frozen=True, array_like=True, tag="built"):
    """Weights and pool are there; what they are."""

    what: str


class Compiled(msgspec.Struct, frozen=True, array_like=True, tag="compiled"):
    """As many calls have been compiled as were to be."""

    count: int


class Draining(msgspec.Struct, frozen=True, array_like=True, tag="draining"):
    """This process is to end in good order, and so the gang."""


class End(msgspec.Struct, frozen=True, array_like=True, tag="end"):
    """Nothing will be run any more."""


Frame = Hello | Welcome | Refused | Beat | Built | Compiled | Draining | End | Run

_decoder = msgspec.msgpack.Decoder(Frame)
_encoder = msgspec.msgpack.Encoder()


class Connection:
    """Frames over a stream, each after its length. Sending is thread-safe."""

    def __init__(self, sock: socket.socket):
        self._sock = sock
        self._lock = threading.Lock()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Who waits for the others says nothing, and would never hear that the first has gone.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            sock.setsockopt(socket.IPPROTO_TCP, option, value)

    def send(self, frame: Frame) -> None:
        """Sends a frame; blocks while the other side reads nothing.

        Raises:
            GangLostError: it cannot be sent.
        """
        data = _encoder.encode(frame)
        try:
            with self._lock:
                self._sock.sendall(_HEADER.pack(len(data)) + data)
        except OSError as error:
            raise GangLostError(f"cannot be told anything: {error}") from error

    def receive(self, most: int = 2**40) -> Frame:
        """Waits for a frame.

        Args:
            most: bytes that it may have.

        Raises:
            GangLostError: the connection has ended, nothing has come in time, or what has come is
                no frame.
        """
        try:
            (length,) = _HEADER.unpack(self._exactly(_HEADER.size))
            if length > most:
                raise GangLostError(f"sends a frame of {length} bytes")
            return _decoder.decode(self._exactly(length))
        except TimeoutError as error:
            raise GangLostError(f"has said nothing for {self._sock.gettimeout():g} s") from error
        except OSError as error:
            raise GangLostError(f"its connection has broken: {error}") from error
        except msgspec.DecodeError as error:
            raise GangLostError(f"sends what is no frame: {error}") from error

    def timeout(self, seconds: float) -> None:
        """Of everything from now on."""
        self._sock.settimeout(seconds)

    def close(self) -> None:
        """Ends it."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _exactly(self, count: int) -> bytearray:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            received = self._sock.recv_into(view)
            if not received:
                raise GangLostError("has ended")
            view = view[received:]
        return data
