"""What the sessions of late have asked for, and what it cost: for the page at `/ui`.

Only calls that name a session are here. Numbers and names, never what was asked or answered.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pshare_jax.core.requests import Request
from pshare_jax.core.sessions import session_key
from pshare_jax.serve.protocol import Usage

MAX_SESSIONS = 50
"""Those that were heard of last; older ones are forgotten."""


@dataclass
class _Session:
    id: str
    key: str
    calls: Counter[str] = field(default_factory=Counter[str])
    running: int = 0
    prompt: int = 0
    cached: int = 0
    shared: int = 0
    generated: int = 0
    last: float = 0.0


class SessionLog:
    """The sessions of one server. Written by the event loop, read by any thread."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[tuple[str, str], _Session] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def call(self, request: Request, usage: Callable[[], Usage]) -> Generator[None]:
        """Notes a call of a session while the block lasts.

        Args:
            request: the first of its sequences; nothing is noted of one without a session.
            usage: of the whole call, asked when the block ends. The prompt of a call that has
                generated nothing counts for nothing: nobody knows what was found of it.
        """
        key = session_key(request)
        if key is None:
            yield
            return
        with self._lock:
            session = self._sessions.setdefault(
                key, _Session(request.session.id, request.owner.key)
            )
            session.calls[request.model] += 1
            session.running += 1
            self._heard(key, session)
        try:
            yield
        finally:
            spent = usage()
            with self._lock:
                session.running -= 1
                if spent.completion_tokens:
                    session.prompt += spent.prompt_tokens
                    session.cached += spent.prompt_tokens_details.cached_tokens
                    session.shared += spent.prompt_tokens_details.shared_tokens
                    session.generated += spent.completion_tokens
                self._heard(key, session)

    def newest(self) -> list[dict[str, Any]]:
        """The sessions, latest first: `id`, `key` (the API key's name), `calls` by model,
        `running`, tokens (`prompt`, `cached`, `shared`, `generated`), and `last`, when it was
        heard of, in seconds of `time.monotonic`."""
        with self._lock:
            return [vars(s) | {"calls": dict(s.calls)} for s in reversed(self._sessions.values())]

    def _heard(self, key: tuple[str, str], session: _Session) -> None:
        session.last = time.monotonic()
        self._sessions[key] = session
        self._sessions.move_to_end(key)
        if len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)
