"""Which of its two workers a mesh works for, where it may do either.

Such a mesh has a prefill worker and a decode worker over one pool, and both are compiled. One of
them is sent sequences. When that changes, the other gives back what has not begun, and rows go on
elsewhere with their KV; what is being computed or fetched from there ends in its own time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from pshare_jax.core.balance import BalancePolicy, Balancer
from pshare_jax.core.messages import Outbox, SetRole
from pshare_jax.core.router import NoWorkerError, Router

LOOK_SECONDS = 0.1
"""Between two looks whether a mesh had better do the other."""

Hosts = Mapping[str, Iterable[str]]
"""Decode workers by model."""


class Roles:
    """Changes what meshes do.

    Args:
        router: sends sequences to those that work.
        policy: when meshes change by themselves; None is never.
    """

    def __init__(self, router: Router, policy: BalancePolicy | None = None):
        self._router = router
        self._balancer = None if policy is None else Balancer(policy)
        self._next_look = 0.0

    def balance(self, hosts: Callable[[], Hosts], now: float) -> Outbox:
        """Gives a mesh to its other worker if that is lacking; `now` is in seconds."""
        if self._balancer is None or now < self._next_look:
            return []
        self._next_look = now + LOOK_SECONDS
        giver = self._balancer.decide(*self._router.loads(), now)
        if giver is None:
            return []
        try:
            return self.give(self._router.twin(giver), hosts())
        except NoWorkerError:
            return []

    def give(self, worker: str, hosts: Hosts) -> Outbox:
        """Gives a mesh to one of its workers; what both have to be told.

        Raises:
            NoWorkerError: there is no such worker, or nobody would be left to do its twin's work.
        """
        router, twin = self._router, self._router.twin(worker)
        if not twin or worker not in router.workers:
            raise NoWorkerError(f"{worker} is no worker, alive, of a mesh that may do either")
        worked = router.working([worker, twin])
        router.set_role(twin, works=False)
        router.set_role(worker, works=True)
        if lacking := router.unserved(hosts):
            for name in (worker, twin):
                router.set_role(name, works=name in worked)
            raise NoWorkerError(f"without {twin} nobody could {lacking}")
        told: Outbox = [(worker, SetRole(True)), (twin, SetRole(False))]
        if worker not in worked and worker in (prefill := router.prefill_workers):
            told += [(w, SetRole(True, anew=True)) for w in router.working(prefill) if w != worker]
        return told

    def wake(self, hosts: Hosts) -> Outbox:
        """Has workers that rest work again where others have failed and nobody is left."""
        router = self._router
        woken: Outbox = []
        if not router.unserved(hosts):
            return woken
        for worker in router.workers:
            lacking = router.unserved(hosts)
            if not lacking or router.working([worker]):
                continue
            router.set_role(worker, works=True)
            if router.unserved(hosts) == lacking:
                router.set_role(worker, works=False)
            else:
                woken.append((worker, SetRole(True)))
        return woken
