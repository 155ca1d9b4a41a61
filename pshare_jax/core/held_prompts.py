"""Prompts that are covered: their pages are held and put on offer until somebody has them."""

from __future__ import annotations

from pshare_jax.core import messages as m
from pshare_jax.core.loans import offer_answer
from pshare_jax.core.messages import Message
from pshare_jax.core.plans import Offer, PrefillPlan, PrefillResult
from pshare_jax.core.prefill_task import PrefillTask


class HeldPrompts:
    """Covered prompts by the id under which they are asked for, and the offers of their pages."""

    def __init__(self) -> None:
        self._held: dict[int, PrefillTask] = {}
        self._offers: list[Offer] = []
        self._offer_of: dict[int, int] = {}
        self._withdrawn: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._held)

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for pages that are there."""
        return bool(self._offers)

    def tasks(self) -> list[PrefillTask]:
        """Who holds pages."""
        return list(self._held.values())

    def add(self, id: int, task: PrefillTask) -> None:
        """All of a prompt is covered."""
        self._held[id] = task

    def fetch(self, name: str, fetch: m.Fetch) -> m.NotOffered | None:
        """Puts pages on offer with the next plan; says so if that cannot be.

        Args:
            name: of the worker that is asked.
            fetch: which pages, and for whom.
        """
        task = self._held.get(fetch.id)
        if task is None:
            return m.NotOffered(
                fetch.transfer, f"{name} does not hold sequence {fetch.id}", fetch.id
            )
        chain = task.sequence.chain
        self._offer_of[fetch.transfer] = fetch.id
        self._offers.append(
            Offer(
                fetch.transfer,
                fetch.worker,
                [task.pages[number] for number in fetch.pages],
                [chain[number] for number in fetch.pages],
                fetch.reader,
            )
        )
        return None

    def take_offers(self) -> list[Offer]:
        """What is to be put on offer now."""
        offers, self._offers = self._offers, []
        return offers

    def take_withdrawn(self) -> list[int]:
        """Transfers whose pages need not be on offer any more."""
        withdrawn, self._withdrawn = self._withdrawn, []
        return withdrawn

    def answers(self, plan: PrefillPlan, result: PrefillResult) -> list[tuple[str, Message]]:
        """What those hear who have asked for pages of prompts that are held."""
        return [
            (offer.target, offer_answer(offer, result, self._offer_of[offer.transfer]))
            for offer in plan.offers
            if offer.transfer in self._offer_of
        ]

    def is_offered(self, task: PrefillTask) -> bool:
        """Whether somebody may be reading its pages."""
        return task.sequence.id in self._offer_of.values()

    def give_way(self, task: PrefillTask) -> None:
        """One that is not on offer holds its pages no longer, and will be covered again."""
        del self._held[task.sequence.id]

    def release(self, id: int) -> PrefillTask | None:
        """Nobody needs the pages any more; whose they were, if it is here."""
        task = self._held.pop(id, None)
        if task is None:
            return None
        self._offers = [o for o in self._offers if self._offer_of.get(o.transfer) != id]
        for transfer in [t for t, owner in self._offer_of.items() if owner == id]:
            del self._offer_of[transfer]
            self._withdrawn.append(transfer)
        return task

    def clear(self) -> None:
        """Forgets all."""
        self._held.clear()
        self._offers.clear()
