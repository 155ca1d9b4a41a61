"""Log lines that can neither hold up nor end the server, and that no client can flood.

A full disk, a closed pipe or a pipe that nobody reads are the reader's trouble: lines are written
by a thread of their own, from a queue with an end, and those that cannot be written are lost.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

log = logging.getLogger(__name__)

ACCESS_LOGGER = "aiohttp.access"
"""One line a request is its purpose; all other loggers are bounded."""

BARE = "bare"
"""Attribute of a record that is a whole line already."""

_MAX_WAITING = 10_000
_CLOSE_SECONDS = 1.0
_BURST, _WINDOW_SECONDS = 10, 10.0
# Places in the code; there are only so many.
_MAX_KINDS = 10_000


def set_up(level: int = logging.INFO) -> None:
    """Sends all log lines to standard error, through a `LineWriter`, unless they go somewhere."""
    if logging.getLogger().handlers:
        return
    handler = LineWriter(2)
    handler.addFilter(RateLimit())
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


def open_standard_streams() -> None:
    """Opens what of standard input, output and error is closed, to nothing.

    Otherwise the next socket would get its number, and what libraries print would go to a client.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def say(line: str, stream: TextIO | None) -> None:
    """Prints a line for people or scripts, after the log lines so far.

    That it cannot be written is logged, and no error.
    """
    for handler in logging.getLogger().handlers:
        handler.flush()
    if stream is None:
        return
    try:
        print(line, file=stream, flush=True)
    except OSError as error:
        # What is left in the stream's buffer would fail once more at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if stream is not sys.stderr:
            log.warning("standard output cannot be written (%s): %s", error.strerror, line)


class LineFormatter(logging.Formatter):
    """Says how many lines of a kind were left out before this one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        if getattr(record, BARE, False):
            return record.getMessage()
        text = super().format(record)
        if left_out := getattr(record, "left_out", 0):
            text += f" ({left_out} more of this kind were not logged)"
        return text


class RateLimit(logging.Filter):
    """Lets 10 lines from one place of the code through in 10 seconds, but all of the access log.

    So a client that sends nonsense a thousand times a second fills no disk.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        super().__init__()
        self._clock = clock
        self._kinds: dict[tuple[str, int], _Kind] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether `record` is written."""
        if record.name == ACCESS_LOGGER:
            return True
        place = (record.pathname, record.lineno)
        kind = self._kinds.get(place)
        if kind is None:
            if len(self._kinds) >= _MAX_KINDS:
                return False
            kind = self._kinds[place] = _Kind()
        now = self._clock()
        if now >= kind.window_end:
            kind.window_end, kind.count = now + _WINDOW_SECONDS, 0
        kind.count += 1
        if kind.count > _BURST:
            kind.left_out += 1
            return False
        record.left_out, kind.left_out = kind.left_out, 0
        return True


class _Kind:
    __slots__ = ("count", "left_out", "window_end")

    def __init__(self) -> None:
        self.window_end, self.count, self.left_out = 0.0, 0, 0


class LineWriter(logging.Handler):
    """Writes lines to a file descriptor, from a thread; never blocks or raises.

    Args:
        descriptor: of an open file, pipe or terminal.
        max_waiting: lines that wait while the descriptor blocks; further ones are lost.
    """

    def __init__(self, descriptor: int, max_waiting: int = _MAX_WAITING):
        super().__init__()
        self._descriptor = descriptor
        self._lines: queue.Queue[bytes | threading.Event | None] = queue.Queue(max_waiting)
        self._thread = threading.Thread(target=self._write_lines, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queues the record's line."""
        try:
            line = f"{self.format(record)}\n".encode(errors="backslashreplace")
        except Exception:  # arguments that do not fit their message
            line = f"unreadable log record from {record.pathname}:{record.lineno}\n".encode()
        # Where nobody reads there is nobody to be told either.
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(line)

    def flush(self) -> None:
        """Waits until what has come so far is written, for at most a second."""
        written = threading.Event()
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(written)
            if self._thread.is_alive():
                written.wait(_CLOSE_SECONDS)

    def close(self) -> None:
        """Writes what waits, for at most a second. Idempotent."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=_CLOSE_SECONDS)
            self._thread.join(_CLOSE_SECONDS)
        super().close()

    def _write_lines(self) -> None:
        while (line := self._lines.get()) is not None:
            if isinstance(line, threading.Event):
                line.set()
            else:
                _write_all(self._descriptor, line)


def _write_all(descriptor: int, data: bytes) -> None:
    # A full disk, a pipe without a reader, a slow terminal: the next line is tried again.
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(descriptor, data) :]
