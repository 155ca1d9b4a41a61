"""Which agent of a session is called next, and what its prompt begins with.

Agents of a session have contexts of their own (another system prompt, other tools), which grow
from call to call. While one of them is called, the pages of the next one's last prompt can be
brought back. Who is next is what the client says; where it says nothing, it is who has followed
most often in this session, the latest of them among equals.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field

from pshare_jax.core.sequences import Sequence
from pshare_jax.core.sessions import SessionKey

MAX_TOKENS = 4_000_000
"""Prompt tokens that are remembered; sessions that were not heard of for longest are forgotten."""


@dataclass
class _Agents:
    """The agents of a session by name: their last prompts, and who has followed whom how often."""

    last: dict[str, Sequence] = field(default_factory=dict[str, Sequence])
    followers: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    latest: str = ""

    @property
    def tokens(self) -> int:
        return sum(len(sequence.prompt) for sequence in self.last.values())


class AgentOrder:
    """What is known of the agents of all sessions."""

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self._max_tokens = max_tokens
        self._tokens = 0
        self._sessions: OrderedDict[SessionKey, _Agents] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def asked(self, key: SessionKey, agent: str, sequence: Sequence) -> None:
        """An agent of a session is called with this prompt."""
        agents = self._sessions.setdefault(key, _Agents())
        self._sessions.move_to_end(key)
        before = agents.last.get(agent)
        self._tokens += len(sequence.prompt) - (len(before.prompt) if before else 0)
        agents.last[agent] = sequence
        if agents.latest:
            counts = agents.followers.setdefault(agents.latest, {})
            # At the end: the latest wins among equals.
            counts[agent] = counts.pop(agent, 0) + 1
        agents.latest = agent
        while self._tokens > self._max_tokens and self._sessions:
            self._tokens -= self._sessions.popitem(last=False)[1].tokens

    def expected(
        self, key: SessionKey, agent: str, hints: Sequence_[str], now: Sequence
    ) -> list[Sequence]:
        """Last prompts of the agents that will be called after `agent`, soonest first.

        Args:
            key: of the session.
            agent: that is called now.
            hints: who the client says is next; empty is nothing said.
            now: the prompt of the present call. What is a beginning of it is at hand already.
        """
        agents = self._sessions.get(key)
        if agents is None:
            return []
        names = hints or _most_frequent(agents.followers.get(agent, {}))
        found = [agents.last[name] for name in dict.fromkeys(names) if name in agents.last]
        return [sequence for sequence in found if not _begins(now, sequence)]


def _most_frequent(counts: dict[str, int]) -> list[str]:
    return [max(reversed(counts), key=lambda name: counts[name])] if counts else []


def _begins(whole: Sequence, part: Sequence) -> bool:
    """Whether the pages of a prompt are a beginning of another one's."""
    return whole.root == part.root and whole.prompt[: part.covered] == part.prompt[: part.covered]
