"""Grammars of strangers, compiled once in a process that may end before the server's own does it.

A few hundred characters can keep llguidance busy for ever, or have it take all memory: that is not
to be stopped in a thread. The process compiles one grammar after the other, with a limit of
processor time for each and one of memory; where it ends, the grammar is refused, and the next one
gets a new process.

Run as a program this file is that process. It imports nothing of this package: it is there soon.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, BinaryIO, TypeVar

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

log = logging.getLogger(__name__)

T = TypeVar("T")

STACK_BYTES = 256 << 20
"""Stack of a thread that compiles: llguidance goes as deep into a grammar as its rules refer to
each other, and a process whose stack ends is killed. Of the texts of `GrammarLimits.max_chars` the
deepest take 60 MiB; memory is taken as it is used."""

MEMORY_BYTES = 2 << 30
"""Address space of the process, its stacks among it."""

_WALL_SECONDS = 120.0
"""After which the process is given up though it has not used up its time."""

_RETRY_SECONDS = 60.0
_SILENT = 0
_stack_lock = threading.Lock()
_LENGTH = struct.Struct("<I")
_SURVIVED = b"\x01"


class NoThreadError(RuntimeError):
    """The system gives no thread with a deep stack now."""


def on_a_deep_stack(work: Callable[[], T]) -> T:
    """What `work` gives, called in a thread whose stack has `STACK_BYTES`.

    Raises:
        NoThreadError: there is no such thread.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    with _stack_lock:  # of all threads that begin meanwhile
        before = threading.stack_size(STACK_BYTES)
        try:
            threading.Thread(target=run, name="grammar", daemon=True).start()
        except RuntimeError as error:
            raise NoThreadError(str(error)) from error
        finally:
            threading.stack_size(before)
    return result.result()


class Vocabulary:
    """What each token stands for, as llguidance wants it.

    Args:
        tokens: the bytes of each token.
        end_id: the token that ends a text.
        special_ids: tokens that are no text.
    """

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], end_id: int, special_ids: Sequence[int]):
        self.tokens = tokens
        self.eos_token_id = end_id
        self.special_token_ids = list(special_ids)
        special = set(special_ids)
        self._ids = {
            token: token_id
            for token_id, token in enumerate(tokens)
            if token and token_id not in special
        }
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: str | bytes) -> list[int]:
        """Token ids of `text`: always the longest that fits."""
        data = text if isinstance(text, bytes) else text.encode()
        ids: list[int] = []
        start = 0
        while start < len(data):
            for end in range(min(len(data), start + self._longest), start, -1):
                if (token_id := self._ids.get(data[start:end])) is not None:
                    ids.append(token_id)
                    start = end
                    break
            else:
                start += 1  # no token has this byte: llguidance forces nothing then
        return ids


class Trial:
    """The process, from the side of those who ask it. May be used from several threads, in turn.

    Args:
        vocabulary: of the tokenizer.
        end_ids: all tokens that end a text.
        limits: arguments of `LLParserLimits`.
        seconds: of processor time for one grammar.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        end_ids: Sequence[int],
        limits: Mapping[str, Any],
        seconds: float,
    ):
        self._vocabulary = vocabulary
        self._setup = {
            "end_ids": list(end_ids),
            "special_ids": vocabulary.special_token_ids,
            "limits": dict(limits),
            "seconds": seconds,
        }
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize[Any, Trial] | None = None
        self._retry_at = -math.inf

    def survives(self, source: str) -> bool:
        """Whether the process is still there after it has compiled a grammar.

        True too where the system gives no process, which is logged; it is asked again later.

        Args:
            source: the grammar as llguidance takes it.
        """
        with self._lock:
            if time.monotonic() < self._retry_at:
                return True
            try:
                process = self._running()
            except OSError as error:
                log.warning("grammars are compiled without a trial: no process: %s", error)
                self._retry_at = time.monotonic() + _RETRY_SECONDS
                return True
            if self._compiles(process, source):
                return True
            self._end()
            return False

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        process = subprocess.Popen(
            # -P: the folder of this file has modules that would hide others.
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # who interrupts the server means the server
        )
        self._finalizer = weakref.finalize(self, _stop, process)
        self._process = process
        try:
            _send(_pipe(process.stdin), json.dumps(self._setup).encode())
            lengths = struct.pack(f"<{len(self._vocabulary.tokens)}I", *map(len, self._tokens))
            _send(_pipe(process.stdin), lengths)
            _send(_pipe(process.stdin), b"".join(self._tokens))
            if not self._answered(process):
                raise OSError(f"it ended with status {process.wait(1)}")
        except (OSError, subprocess.TimeoutExpired) as error:
            self._end()
            raise OSError(str(error)) from error
        return process

    @property
    def _tokens(self) -> Sequence[bytes]:
        return self._vocabulary.tokens

    def _compiles(self, process: subprocess.Popen[bytes], source: str) -> bool:
        try:
            _send(_pipe(process.stdin), source.encode())
        except OSError:
            return False
        return self._answered(process)

    def _answered(self, process: subprocess.Popen[bytes]) -> bool:
        output = _pipe(process.stdout)
        poll = select.poll()  # select knows no file above the 1,024th
        poll.register(output, select.POLLIN)
        return bool(poll.poll(_WALL_SECONDS * 1000)) and os.read(output.fileno(), 1) == _SURVIVED

    def _end(self) -> None:
        process, self._process = self._process, None
        if self._finalizer is not None:
            self._finalizer.detach()
        if process is not None:
            process.kill()
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Has a process end, which it does when there is nothing more to read."""
    with contextlib.suppress(OSError):
        _pipe(process.stdin).close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    _pipe(process.stdout).close()


def _pipe(pipe: Any) -> BinaryIO:
    assert pipe is not None
    return pipe


def _send(pipe: BinaryIO, data: bytes) -> None:
    pipe.write(_LENGTH.pack(len(data)) + data)
    pipe.flush()


def _receive(pipe: BinaryIO) -> bytes | None:
    head = pipe.read(_LENGTH.size)
    return pipe.read(_LENGTH.unpack(head)[0]) if len(head) == _LENGTH.size else None


def main() -> None:
    """Compiles what comes on the standard input, until it ends."""
    import resource

    with contextlib.suppress(OSError, ValueError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    # The first to go where memory is short.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    given, output = sys.stdin.buffer, sys.stdout.buffer
    setup = json.loads(_receive(given) or b"{}")
    lengths, text = _receive(given) or b"", _receive(given) or b""
    tokens: list[bytes] = []
    start = 0
    for (length,) in struct.iter_unpack("<I", lengths):
        tokens.append(text[start : start + length])
        start += length
    vocabulary = Vocabulary(tokens, setup["end_ids"][0], setup["special_ids"])
    tokenizer = LLTokenizer(TokenizerWrapper(vocabulary), eos_token=setup["end_ids"])
    limits = LLParserLimits(**setup["limits"])
    while True:
        output.write(_SURVIVED)
        output.flush()
        if (source := _receive(given)) is None:
            return
        # Of processor time, of all threads; at its end the process is killed.
        signal.setitimer(signal.ITIMER_PROF, setup["seconds"])
        on_a_deep_stack(partial(_compile, tokenizer, source.decode(), limits))
        signal.setitimer(signal.ITIMER_PROF, 0)


def _compile(tokenizer: LLTokenizer, source: str, limits: LLParserLimits) -> None:
    """As `GrammarCompiler` does; what is wrong with the grammar is said there."""
    with contextlib.suppress(Exception):
        matcher = LLMatcher(tokenizer, source, log_level=_SILENT, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
            matcher.compute_ff_tokens()


if __name__ == "__main__":
    main()
