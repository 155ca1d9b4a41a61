"""Sessions: calls that go on from each other, and what is done for the next one ahead of it.

What a client says of a session are hints: no token depends on them. The router keeps a session with
its workers, page caches keep its pages for a while, and a reply may be covered by the prefill
module before the next prompt comes.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import msgspec

from pshare_jax.core.messages import Replied
from pshare_jax.core.pages.prefix_index import block_key, block_keys
from pshare_jax.core.requests import Request
from pshare_jax.core.sequences import Sequence

MAX_SESSIONS = 65_536
"""Sessions whose workers are remembered; those that were not heard of for longest are forgotten."""

SessionKey = tuple[str, str]
"""A tenant's cache salt, and the id that it gave a session."""


@dataclass(frozen=True)
class SessionPolicy:
    """What is done for sessions.

    Args:
        reply_ahead: whether replies are covered before anybody asks.
        max_ttl: seconds for which pages may be pinned; longer hints are cut.
        prefetch: whether prefill workers are told what prompts are expected.
        streaming_step: tokens after which a reply that has not ended is covered so far, again and
            again; 0 waits for its end. Of use where prefill has a processor of its own, which is
            idle while replies are generated.
    """

    reply_ahead: bool = False
    max_ttl: float = 3600.0
    prefetch: bool = False
    streaming_step: int = 0


def session_key(request: Request) -> SessionKey | None:
    """What the router knows the request's session by; tenants cannot meet in one."""
    return (request.cache_salt, request.session.id) if request.session.id else None


def replied(
    policy: SessionPolicy, request: Request, sequence: Sequence, id: int, page_size: int
) -> Replied | None:
    """What the prefill worker is told of a reply; None when there is nothing to be done about it.

    Args:
        policy: what is done.
        request: that has ended.
        sequence: the last attempt at it, with all its output.
        id: of the sequence that the reply is known by.
        page_size: tokens of a page.
    """
    ahead = policy.reply_ahead and request.goes_on and bool(sequence.output)
    if not ahead and sequence.ttl <= 0:
        return None
    tokens = (*sequence.prompt, *sequence.output)
    known = len(sequence.keys)
    start = sequence.keys[-1] if known else sequence.root
    keys = [*sequence.keys, *block_keys(start, tokens[known * page_size :], page_size)]
    rest = tokens[len(keys) * page_size :]
    whole = msgspec.structs.replace(
        sequence,
        id=id,
        prompt=tokens,
        output=(),
        covered=len(tokens),
        keys=keys,
        last_key=block_key(keys[-1] if keys else sequence.root, rest),
    )
    return Replied(whole, known, ahead)


@dataclass
class Stay:
    """Where a session was last: its prefill worker, and its decode workers, latest last."""

    prefill: str
    decode: dict[str, None]


class SessionTable:
    """Which workers the calls of a session went to."""

    def __init__(self) -> None:
        self._stays: OrderedDict[SessionKey, Stay] = OrderedDict()

    def __len__(self) -> int:
        return len(self._stays)

    def find(self, key: SessionKey | None) -> Stay | None:
        """Where the session was last, if that is known."""
        return None if key is None else self._stays.get(key)

    def went(self, key: SessionKey | None, prefill: str, decode: str) -> None:
        """A call of the session has been routed."""
        if key is None:
            return
        stay = self._stays.setdefault(key, Stay(prefill, {}))
        stay.prefill = prefill
        stay.decode.pop(decode, None)
        stay.decode[decode] = None
        self._stays.move_to_end(key)
        if len(self._stays) > MAX_SESSIONS:
            self._stays.popitem(last=False)

    def moved(self, key: SessionKey | None, decode: str) -> None:
        """A call of the session goes on at another decode worker."""
        stay = self.find(key)
        if stay is not None:
            stay.decode.pop(decode, None)
            stay.decode[decode] = None
