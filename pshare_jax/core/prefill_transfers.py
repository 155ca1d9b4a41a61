"""What a prefill worker's pages are wanted for elsewhere, and what it gets from elsewhere.

Decode workers fetch what was covered for them; other prefill workers borrow what they lack, and so
does this one.
"""

from __future__ import annotations

from collections.abc import Iterator

from pshare_jax.core import messages as m
from pshare_jax.core.borrowing import Borrowing
from pshare_jax.core.held_prompts import HeldPrompts
from pshare_jax.core.loans import Loans
from pshare_jax.core.messages import Message, Outbox
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.plans import PrefillPlan, PrefillResult
from pshare_jax.core.prefill_task import PrefillTask
from pshare_jax.core.stats import PrefillStats
from pshare_jax.core.unasked import Unasked

POLL_SECONDS = 0.0005
"""Between two looks at a transfer that is being pulled."""

ANSWER_SECONDS = 0.01
"""Between two looks at the deadlines of what other workers were asked for."""

LEASE_LOOK_SECONDS = 1.0
"""Between two looks at leases of what others have borrowed."""

TransferMessage = m.Fetch | m.Lend | m.Repaid | m.Offered | m.NotOffered


class PrefillTransfers:
    """Transfers of one prefill worker.

    Args:
        name: of the worker.
        cache: its pages.
        outbox: where messages to others go.
        transfer_ids: see `Borrowing`.
        stats: what has been done.

    Attributes:
        held: prompts that are covered.
        loans: pages that other workers borrow.
        borrowing: prompts for which pages come from other workers.
    """

    def __init__(
        self,
        name: str,
        cache: PageCache,
        outbox: Outbox,
        transfer_ids: Iterator[int],
        stats: PrefillStats,
    ):
        self.held = HeldPrompts()
        self.loans = Loans(name, cache, outbox)
        self.borrowing = Borrowing(name, cache, outbox, transfer_ids, stats)
        self._name = name
        self._outbox = outbox
        self._ids = transfer_ids
        self._stats = stats

    def offer_unasked(self) -> None:
        """Has pages of prompts put on offer as soon as these are covered."""
        self.held.unasked = Unasked(self._ids, self._stats)

    @property
    def urgent(self) -> bool:
        """Whether somebody waits for pages that are there, or some can be pulled."""
        return self.held.wanted or self.loans.wanted or self.borrowing.urgent

    @property
    def patience(self) -> float | None:
        """Seconds after which to look again though nothing was heard; None is for ever."""
        if self.borrowing.is_pulling:
            return POLL_SECONDS
        if self.borrowing.waits:
            return ANSWER_SECONDS
        return LEASE_LOOK_SECONDS if self.loans else None

    def hear(self, message: TransferMessage) -> None:
        """Takes a message in."""
        match message:
            case m.Fetch():
                refused = self.held.fetch(self._name, message)
                if refused is not None:
                    self._say(message.worker, refused)
            case m.Lend():
                self.loans.lend(message)
            case m.Repaid(id, transfer):
                self.loans.repaid(id, transfer)
            case m.Offered():
                self.borrowing.offered(message)
            case m.NotOffered():
                self.borrowing.not_offered(message)

    def take_withdrawn(self) -> list[int]:
        """Transfers whose pages need not be on offer any more."""
        return [*self.held.take_withdrawn(), *self.loans.take_ended()]

    def plan(self, now: float, withdrawn: list[int]) -> PrefillPlan | None:
        """What others wait for, and what can be pulled, alone; None if there is nothing of it.

        Args:
            now: in seconds, from any start.
            withdrawn: goes with it.
        """
        self.loans.expire(now)
        self.borrowing.expire(now)
        offers = [*self.held.take_offers(), *self.loans.take_offers()]
        cancelled, pulls = self.borrowing.take_cancelled(), self.borrowing.take_pulls()
        if not (offers or cancelled or pulls):
            return None
        return PrefillPlan(offers=offers, withdrawn=withdrawn, cancelled=cancelled, pulls=pulls)

    def apply(self, plan: PrefillPlan, result: PrefillResult) -> None:
        """Takes in what came of a plan."""
        self._outbox += self.held.answers(plan, result)
        self.loans.offered(plan.offers, result)
        self.borrowing.landed(result.landed)

    def release_all(self) -> list[PrefillTask]:
        """Forgets all, and gives borrowed pages back; gives the prompts that are held."""
        held = self.held.tasks()
        self.held.clear()
        self.borrowing.release_all()
        self.loans.release_all()
        return held

    def _say(self, to: str, message: Message) -> None:
        self._outbox.append((to, message))
