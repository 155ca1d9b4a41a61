"""Pages that a prefill worker puts on offer before it is asked for them.

Where workers are processes a decode worker that asks for what it lacks waits for a message there
and one back, each of which is heard between two pieces of work. So a prompt that has just been
covered is told of together with an offer of its last pages: those that the router thinks the decode
worker lacks. If that is so they are pulled at once; otherwise it asks for what it lacks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import msgspec

from pshare_jax.core import messages as m
from pshare_jax.core.plans import Offer
from pshare_jax.core.prefill_task import PrefillTask
from pshare_jax.core.sequences import Sequence
from pshare_jax.core.stats import PrefillStats

MAX_ALIKE = 8
"""To one decode worker, for one client's sequences of one model, that are neither asked for nor
released yet; it asks for what is covered for it meanwhile. Those that wait for room count, though
it has let their offers go: one that comes after them would wait, too."""

MAX_OFFERS = 12
"""To one decode worker in all. A client that has none of them is offered one all the same: who has
nothing there gets room before those that wait."""

MAX_PAGES = 64
"""Of an offer; more are worth a question."""

MAX_KEYS = 2**16
"""Of pages that are remembered to have gone to a decode worker."""


class Unasked:
    """Offers that nobody has asked for, by transfer.

    Args:
        ids: of transfers; never used twice, and hard to guess where they cross processes.
        stats: what has been done.
    """

    def __init__(self, ids: Iterator[int], stats: PrefillStats):
        self._ids = ids
        self._stats = stats
        self._readers: dict[str, str] = {}
        self._covered: dict[int, m.Covered] = {}
        self._untold: set[int] = set()
        self._gone: dict[str, OrderedDict[bytes, None]] = {}

    def heard_of(self, worker: str, reader: str) -> None:
        """A decode worker has said how it reads pages, see `messages.Fetch`; before it has, it is
        offered nothing unasked."""
        self._readers[worker] = reader

    def asked(self, worker: str) -> None:
        """A decode worker has asked for pages: what has gone there may be there no more."""
        self._gone.pop(worker, None)

    def offer(self, task: PrefillTask, covered: m.Covered, page_size: int) -> Offer | None:
        """What to put on offer of a prompt before its decode worker hears that it is covered; None
        if that is to be told at once."""
        sequence = task.sequence
        to, chain = sequence.decode_worker, sequence.chain
        reader = self._readers.get(to)
        if reader is None:
            return None
        count = -(-sequence.covered // page_size)
        gone = self._gone.setdefault(to, OrderedDict())
        first = min(sequence.num_there, len(sequence.keys))
        # What went there for another prompt a moment ago the router did not know of.
        while first < len(sequence.keys) and chain[first] in gone:
            first += 1
        if not 0 < count - first <= MAX_PAGES:
            return None
        if self._is_crowded(sequence):
            self._stats.unasked[to, "crowded"] += 1
            return None
        transfer = next(self._ids)
        self._covered[transfer] = msgspec.structs.replace(covered, first=first)
        self._untold.add(transfer)
        gone.update(dict.fromkeys(sequence.keys[first:]))
        while len(gone) > MAX_KEYS:
            gone.popitem(last=False)
        return Offer(transfer, to, task.pages[first:count], chain[first:count], reader)

    def told(self, transfer: int, answer: m.Offered | m.NotOffered) -> m.Covered | None:
        """What the decode worker is to hear now that an offer has been made, or could not be; None
        if it was none of these."""
        if transfer not in self._untold:
            return None
        self._untold.discard(transfer)
        covered = self._covered[transfer]
        if isinstance(answer, m.Offered):
            self._stats.unasked[covered.sequence.decode_worker, "made"] += 1
            return msgspec.structs.replace(covered, offer=answer)
        del self._covered[transfer]
        return covered

    def is_untold(self, id: int) -> bool:
        """Whether the decode worker of a sequence has not heard yet that it is covered."""
        return any(self._covered[transfer].sequence.id == id for transfer in self._untold)

    def forget(self, id: int) -> list[int]:
        """Offers of a sequence that are of no use any more."""
        ended = [t for t, covered in self._covered.items() if covered.sequence.id == id]
        for transfer in ended:
            self._untold.discard(transfer)
            del self._covered[transfer]
        return ended

    def _is_crowded(self, sequence: Sequence) -> bool:
        """Whether so many offers stand that the one for a sequence is not made."""
        client, model, _ = sequence.path
        standing = [one.sequence for one in self._covered.values()]
        there = [one.path for one in standing if one.decode_worker == sequence.decode_worker]
        if len(there) >= MAX_OFFERS:
            return any(path[0] == client for path in there)
        return [path[1] for path in there].count(model) >= MAX_ALIKE

    def clear(self) -> None:
        """Forgets all."""
        self._covered.clear()
        self._untold.clear()
        self._gone.clear()
