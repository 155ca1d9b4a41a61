"""A prefill core and a decode core over one pool: who gets pages that are wanted by both.

Sequences that run and prompts that are being covered hold pages of the same pool. The oldest gets
on: a sequence that finds no page takes them from the youngest, wherever that is.
"""

from __future__ import annotations

from pshare_jax.core.decode import DecodeCore
from pshare_jax.core.messages import Withdrawn
from pshare_jax.core.plans import DecodePlan, PrefillPlan
from pshare_jax.core.prefill import PrefillCore


class OnePool:
    """Schedules both cores of a pool.

    Args:
        prefill: the prefill core.
        decode: the decode core, over the same page cache.
    """

    def __init__(self, prefill: PrefillCore, decode: DecodeCore):
        if prefill.cache is not decode.cache:
            raise ValueError("the cores of one pool must have the same page cache")
        self.prefill = prefill
        self.decode = decode

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
        if queue.wanting is not None and self.decode.make_room(queue.wanting):
            queue.favour()
            return plan or self.prefill.schedule(now)
        return plan

    def schedule_decode(self, now: float) -> DecodePlan | None:
        """The decode core's next plan; what it lacks is taken from prompts that hold pages."""
        while True:
            holders = self.prefill.holders(self.decode.inside_ids())
            self.decode.elsewhere, self.decode.crowded = holders, self.prefill.holds_pages
            plan = self.decode.schedule(now)
            starved = next((task for task in holders if task is self.decode.starved), None)
            gave = starved is not None and self.prefill.give_way(starved)
            if starved is not None and gave:
                # At once: with the pages that are free now it would be let in.
                self.decode.receive(Withdrawn(starved.sequence.id))
            if plan is not None or not gave:
                return plan
