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

    def schedule_prefill(self, now: float = 0.0) -> PrefillPlan | None:
        """The prefill core's next plan; it leaves a page for each sequence that runs."""
        self.prefill.reserve = self.decode.admission.num_inside
        return self.prefill.schedule(now)

    def schedule_decode(self, now: float) -> DecodePlan | None:
        """The decode core's next plan; what it lacks is taken from younger prompts."""
        while True:
            self.decode.youngest_elsewhere = self.prefill.youngest_holder
            plan = self.decode.schedule(now)
            starved = self.decode.starved
            if starved is None:
                return plan
            withdrawn = self.prefill.give_way(starved, self.decode.inside_ids())
            if withdrawn is not None:
                # At once: with the pages that are free now it would be let in.
                self.decode.receive(Withdrawn(withdrawn))
            if plan is not None or withdrawn is None:
                return plan
