"""Grammars of a worker's sequences: compiled beside its thread, and kept while they are here."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from pshare_jax.core.constraints import GrammarSpec
from pshare_jax.core.messages import (
    Covered,
    Dropped,
    Failed,
    Message,
    Prefill,
    Returned,
    Tokens,
)
from pshare_jax.errors import PshareError
from pshare_jax.text.grammar import GrammarCompiler


class HostedGrammars:
    """Holds the grammar of each sequence from before a worker hears of it until it has gone.

    So no grammar is compiled in the workers' thread, where it would keep all sequences waiting,
    however many of them there are.

    Args:
        compiler: of the process's workers.
    """

    def __init__(self, compiler: GrammarCompiler):
        self._compiler = compiler
        self._held: dict[int, GrammarSpec] = {}
        self._lock = threading.Lock()

    def prepare(self, message: Message) -> Callable[[], None] | None:
        """What takes too long for the thread of connections before a message is `taken`, if any."""
        spec = _grammar_of(message)
        if spec is None or self._compiler.has(spec):
            return None

        def compile_it() -> None:
            # What is wrong with it is said when the sequence gets a slot.
            with contextlib.suppress(PshareError):
                self._compiler.compile(spec, "grammar")

        return compile_it

    def taken(self, message: Message) -> None:
        """A worker is about to hear a message, and its grammar is compiled."""
        spec = _grammar_of(message)
        if spec is None or not isinstance(message, Covered | Prefill):
            return
        with self._lock:
            known = message.sequence.id in self._held
            self._held.setdefault(message.sequence.id, spec)
        if not known:
            self._compiler.keep(spec)

    def sent(self, message: Message) -> None:
        """A worker has said something: with the end of a sequence its grammar may go."""
        gone = isinstance(message, Dropped | Failed | Returned)
        if gone or (isinstance(message, Tokens) and message.reason is not None):
            with self._lock:
                spec = self._held.pop(message.id, None)
            if spec is not None:
                self._compiler.release(spec)


def _grammar_of(message: Message) -> GrammarSpec | None:
    return message.sequence.params.grammar if isinstance(message, Covered | Prefill) else None
