"""A prefill core and a decode core over one pool: who gets pages that are wanted by both.

Sequences that run and prompts that are being covered hold pages of the same pool. The oldest gets
on: a sequence that finds no page takes them from the youngest, wherever that is.

Where a mesh may do either, rows of a decode core that is to let all go are handed to the prefill
core, which holds their pages as it holds those of a prompt, until who generates now has them.
"""

from __future__ import annotations

from hashlib import blake2b

from pshare_jax.core.decode import DecodeCore
from pshare_jax.core.messages import Withdrawn
from pshare_jax.core.pages.prefix_index import block_key
from pshare_jax.core.plans import DecodePlan, PrefillPlan
from pshare_jax.core.pool_prompts import PoolPrompts
from pshare_jax.core.prefill import PrefillCore
from pshare_jax.core.rows import DecodeRow
from pshare_jax.core.sequences import Moved


class OnePool:
    """Schedules both cores of a pool.

    Args:
        prefill: the prefill core.
        decode: the decode core, over the same page cache.
        moves: whether rows take their KV along when the mesh is given to prefill; else they are
            replayed.
    """

    def __init__(self, prefill: PrefillCore, decode: DecodeCore, *, moves: bool = True):
        self._moves = moves
        if prefill.cache is not decode.cache:
            raise ValueError("the cores of one pool must have the same page cache")
        self.prefill = prefill
        self.decode = decode
        self._prompts = PoolPrompts(prefill)

    def schedule_prefill(self, now: float) -> PrefillPlan | None:
        """The prefill core's next plan; it leaves a page for each sequence that runs.

        A sequence whose client, model or request has nothing gets the pages of one that runs, if
        others have too much.
        """
        queue = self.prefill.queue
        # What has just given way for a row comes back when that row has got its page.
        queue.before = self.decode.short
        queue.reserve = self.decode.admission.num_inside
        plan = self.prefill.schedule(now)
        if queue.wanting is not None and self.decode.rows.make_room(queue.wanting):
            queue.favour()
            return plan or self.prefill.schedule(now)
        return plan

    def schedule_decode(self, now: float) -> DecodePlan | None:
        """The decode core's next plan; what it lacks is taken from prompts that hold pages."""
        if self._moves:
            self._move_rows()
        while True:
            holders = self._prompts.holders(self.decode.inside_ids())
            rows = self.decode.rows
            rows.elsewhere, rows.crowded = holders, self._prompts.hold_pages
            plan = self.decode.schedule(now)
            starved = next((task for task in holders if task is rows.starved), None)
            gave = starved is not None and self._prompts.give_way(starved)
            if starved is not None and gave:
                # At once: with the pages that are free now it would be let in.
                self.decode.receive(Withdrawn(starved.sequence.id))
            if plan is not None or not gave:
                return plan

    def _move_rows(self) -> None:
        for row in self.decode.movable():
            if row.num_kv == 0:
                continue  # there is nothing to take along
            moved = moved_kv(self.prefill.name, row, self.decode.cache.page_size)
            pages = self.decode.move(row, moved)
            self._prompts.hold_moved(row.sequence, moved, pages)


def moved_kv(worker: str, row: DecodeRow, page_size: int) -> Moved:
    """What a row takes along; `worker` holds it."""
    sequence, keys = row.sequence, list(row.sequence.keys)
    # What a decode module writes is its own: it never has a key that an index knows.
    writer = f"{sequence.model} {sequence.adapted}".encode()
    parent = blake2b(sequence.parent_key(len(keys)) + writer, digest_size=16).digest()
    for start in range(len(keys) * page_size, row.num_kv, page_size):
        parent = block_key(parent, row.known_tokens(start, min(start + page_size, row.num_kv)))
        keys.append(parent)
    return Moved(worker, sequence.id, row.num_kv, keys)
