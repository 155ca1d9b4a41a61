"""Prompts that are covered: their pages are held and put on offer until somebody has them."""

from __future__ import annotations

from collections.abc import Collection

from pshare_jax.core import messages as m
from pshare_jax.core.loans import offer_answer
from pshare_jax.core.messages import Message
from pshare_jax.core.plans import Offer, PrefillPlan, PrefillResult
from pshare_jax.core.prefill_task import PrefillTask
from pshare_jax.core.unasked import Unasked


class HeldPrompts:
    """Covered prompts by the id under which they are asked for, and the offers of their pages.

    Attributes:
        unasked: what is put on offer before anybody asks; None is nothing.
    """

    def __init__(self) -> None:
        self.unasked: Unasked | None = None
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

    def cover(self, task: PrefillTask, covered: m.Covered, page_size: int) -> bool:
        """All of a prompt is covered. Whether its decode worker is told of it later, together with
        an offer of its pages: see `answers`."""
        self.add(task.sequence.id, task)
        offer = self.unasked.offer(task, covered, page_size) if self.unasked else None
        if offer is None:
            return False
        self._offer_of[offer.transfer] = task.sequence.id
        self._offers.append(offer)
        return True

    def is_untold(self, id: int) -> bool:
        """Whether a prompt is held, and its decode worker has not been told."""
        return self.unasked is not None and self.unasked.is_untold(id)

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
        if self.unasked is not None:
            self.unasked.heard_of(fetch.worker, fetch.reader)
            self.unasked.asked(fetch.worker)
            self._withdraw(self.unasked.forget(fetch.id))
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
        """What those hear who have asked for pages of prompts that are held, or are to have some
        unasked."""
        answers: list[tuple[str, Message]] = []
        for offer in plan.offers:
            if offer.transfer not in self._offer_of:
                continue
            answer = offer_answer(offer, result, self._offer_of[offer.transfer])
            told = self.unasked.told(offer.transfer, answer) if self.unasked else None
            answers.append((offer.target, told or answer))
        return answers

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
        self._withdraw([t for t, owner in self._offer_of.items() if owner == id])
        if self.unasked is not None:
            self.unasked.forget(id)
        return task

    def _withdraw(self, transfers: Collection[int]) -> None:
        """Offers that are not made yet are not, and others need not stand any more."""
        self._offers = [offer for offer in self._offers if offer.transfer not in transfers]
        for transfer in transfers:
            del self._offer_of[transfer]
            self._withdrawn.append(transfer)

    def clear(self) -> None:
        """Forgets all."""
        self._held.clear()
        self._offers.clear()
        self._offer_of.clear()
        self._withdrawn.clear()
        if self.unasked is not None:
            self.unasked.clear()
