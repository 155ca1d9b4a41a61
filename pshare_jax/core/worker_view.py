"""What one router knows of one worker: soft state, which may be old and is never waited for.

It is made of what the worker says: its index as a snapshot and numbered changes, and now and then
what it has of sequences that other routers have sent. What this router has sent there it knows
itself. What is wrong in it costs time, never a token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from pshare_jax.core.key_map import KeyMap
from pshare_jax.core.messages import IndexChanged, IndexSnapshot


class WorkerInfo(msgspec.Struct, frozen=True):
    """A worker as the router is told of it.

    Args:
        name: of the worker.
        num_pages: what its pool can hold.
        page_size: tokens of a page.
        partner: of a prefill worker that shares its pool with a decode worker: that one, which
            then generates for all prompts that are covered there. A decode worker may name its
            partner, too, so that it is never taken for one that gets pages from elsewhere.
        twin: the worker of the other kind on the same mesh, where a mesh may do either: one of the
            two works, or while it changes both, and they have the same pages.
        rests: whether it is the one that does not.
    """

    name: str
    num_pages: int
    page_size: int
    partner: str = ""
    twin: str = ""
    rests: bool = False


@dataclass(eq=False)
class WorkerView:
    """One worker.

    Attributes:
        info: what it is.
        slot: its number among the workers of its kind.
        known: where the keys of all workers of its kind are noted.
        held: keys in its index.
        sent: keys of prompts that were sent there and that it does not hold as far as is known;
            their KV will soon be there. Oldest first.
        pending: prompt tokens that this router has sent there and that it has not computed, by
            sequence.
        pending_tokens: these in all.
        load: pages that the sequences which this router has sent there read in each step.
        others: what routers elsewhere have sent there, as it said last: tokens to a prefill worker,
            pages to a decode worker.
        in_step: whether no change of its index was missed.
    """

    info: WorkerInfo
    slot: int
    known: KeyMap
    held: set[bytes] = field(default_factory=set[bytes])
    sent: OrderedDict[bytes, None] = field(default_factory=OrderedDict[bytes, None])
    pending: dict[int, int] = field(default_factory=dict[int, int])
    pending_tokens: int = 0
    load: int = 0
    others: int = 0
    in_step: bool = True
    _incarnation: int | None = None
    _number: int = 0

    @property
    def num_known(self) -> int:
        """Keys that it holds or will soon hold."""
        return len(self.held) + len(self.sent)

    def set_pending(self, id: int, tokens: int) -> None:
        """How many tokens of a sequence it still has to compute."""
        self.pending_tokens += tokens - self.pending.pop(id, 0)
        if tokens:
            self.pending[id] = tokens

    def remember(self, chain: Iterable[bytes]) -> None:
        """A prompt of these keys was sent there."""
        for key in chain:
            if key not in self.held:
                self.sent[key] = None
                self.sent.move_to_end(key)
                self.known.add(key, self.slot)
        while len(self.sent) > self.info.num_pages:
            self.known.discard(self.sent.popitem(last=False)[0], self.slot)

    def note(self, added: Iterable[bytes], removed: Iterable[bytes]) -> None:
        """Keys have entered and then others left its index."""
        for key in added:
            self.held.add(key)
            self.sent.pop(key, None)
            self.known.add(key, self.slot)
        for key in removed:
            self.held.discard(key)
            if key not in self.sent:
                self.known.discard(key, self.slot)

    def changed(self, change: IndexChanged) -> bool:
        """Its index has changed. Whether a snapshot should be asked for, now.

        A change that does not follow the one before is taken in all the same: keys are right
        or wrong one by one, and most will be right.
        """
        self.note(change.added, change.removed)
        if self._incarnation is None:
            self._incarnation = change.incarnation
        follows = change.incarnation == self._incarnation and change.number == self._number + 1
        if follows:
            self._number = change.number
            return False
        asks, self.in_step = self.in_step, False
        return asks

    def snapshot(self, snapshot: IndexSnapshot) -> None:
        """All that its index holds after the change that the snapshot names."""
        if snapshot.incarnation == self._incarnation and snapshot.number < self._number:
            return
        for key in self.held.difference(snapshot.keys):
            if key not in self.sent:
                self.known.discard(key, self.slot)
        self.held.clear()
        self.held.update(snapshot.keys)
        for key in snapshot.keys:
            self.sent.pop(key, None)
            self.known.add(key, self.slot)
        self._incarnation, self._number = snapshot.incarnation, snapshot.number
        self.in_step = True

    def clear(self) -> None:
        """Nothing is known of it any more."""
        for key in (*self.held, *self.sent):
            self.known.discard(key, self.slot)
        self.held.clear()
        self.sent.clear()
