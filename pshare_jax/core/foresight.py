"""What prefill workers are told of calls to come: replies that go on, and who is called next."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from pshare_jax.core.agent_order import AgentOrder
from pshare_jax.core.live_request import LiveRequest
from pshare_jax.core.messages import Expected, Replied
from pshare_jax.core.sessions import SessionPolicy, replied, session_key


class Foresight:
    """Says what comes next, by what clients say of their sessions and by what was seen of them.

    Args:
        policy: what is done for sessions.
        page_size: tokens of a page.
        ids: of sequences, never used twice.
    """

    def __init__(self, policy: SessionPolicy, page_size: int, ids: Iterator[int]):
        self._policy = policy
        self._page_size = page_size
        self._ids = ids
        self._agents = AgentOrder()

    def asked(self, live: LiveRequest) -> None:
        """A call of a session begins."""
        key, sequence = session_key(live.request), live.sequence
        if not self._policy.prefetch or key is None or sequence is None or sequence.probe:
            return
        self._agents.asked(key, live.request.model, sequence)

    def expected(self, live: LiveRequest) -> list[Expected]:
        """Which prompts to expect after this call of a session, soonest first."""
        request, sequence, key = live.request, live.sequence, session_key(live.request)
        if not self._policy.prefetch or key is None or sequence is None or sequence.probe:
            return []
        hints = request.session.next_models
        return [
            Expected(msgspec.structs.replace(one, id=next(self._ids), ttl=sequence.ttl or one.ttl))
            for one in self._agents.expected(key, request.model, hints, sequence)
        ]

    def reply(self, live: LiveRequest) -> list[Replied]:
        """What is to be done about the reply so far, if anything."""
        sequence = live.sequence
        if sequence is None or sequence.probe:
            return []
        sequence = msgspec.structs.replace(sequence, output=tuple(live.output))
        told = replied(self._policy, live.request, sequence, next(self._ids), self._page_size)
        return [] if told is None else [told]

    def is_due(self, live: LiveRequest) -> bool:
        """Whether a reply that goes on should be covered so far."""
        step = self._policy.streaming_step
        return 0 < step <= len(live.output) - live.told
