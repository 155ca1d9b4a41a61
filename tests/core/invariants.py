"""What holds of a scripted host between any two actions, and once nothing is left to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pshare_jax.core.decode import DecodeCore
from pshare_jax.core.pages.prefix_index import PageState
from tests.core.symbolic_store import SymbolicStoreEnd

if TYPE_CHECKING:
    from tests.core.scripted import Host


def check_books(host: Host) -> None:
    """Asserts the invariants that hold between any two actions."""
    for name in host.alive:
        (host.prefill.get(name) or host.decode[name]).cache.check()
    for name, worker in host.decode.items():
        if name not in host.dead:
            fetched = _fetched(host, host.partner.get(name))
            check_fillers(worker.core, fetched, may_fail=host.setting.store)


def _fetched(host: Host, prefill: str | None) -> dict[int, int]:
    """Pages that a prefill core fetches from the store, by who wants them."""
    client = host.prefill[prefill].core.store if prefill is not None else None
    runs = client._runs.values() if client is not None else ()
    pieces = [(run.sequence.id, piece) for run in runs for piece in run.pieces.values()]
    return {node.page: id for id, piece in pieces for node in piece.nodes}


def check_idle(host: Host) -> None:
    """Asserts that nothing is held, offered, pulled or remembered of requests."""
    for worker in (*host.prefill.values(), *host.decode.values()):
        worker.cache.check(idle=True)
        assert worker.core.held_ids() == set()
    for name, worker in host.prefill.items():
        client, end = worker.core.store, worker.executor.store
        if client is not None and name not in host.dead:
            assert client.waits is False
            assert isinstance(end, SymbolicStoreEnd)
            assert end.staged == {}
        assert name in host.dead or not worker.core.borrowing.waits
        held = worker.core.held
        books = [held._offers, held._offer_of, held._withdrawn]
        books += [held.unasked._covered, held.unasked._untold] if held.unasked else []
        assert not any(books), books
    for worker in host.decode.values():
        assert worker.name in host.dead or worker.core.admission.num_inside == 0
    for worker in (*host.prefill.values(), *host.decode.values()):
        assert worker.name in host.dead or worker.executor.connector.arriving == {}
        assert len(worker.core.loans) == 0
    assert host.link.offers == {}
    assert host.router._assigned == {}
    assert all(worker.load == 0 for worker in host.router._decode.values())
    assert all(worker.pending_tokens == 0 for worker in host.router._prefill.values())


def check_fillers(core: DecodeCore, fetched: dict[int, int], *, may_fail: bool) -> None:
    """Asserts that each page that somebody waits for has one who brings it, by a live transfer.

    `fetched` are those that a prefill core of the same pool brings from the store, if it has one:
    then they `may_fail`.
    """
    arrivals = core._arrivals
    fillers: dict[int, int] = {}
    for arrival in arrivals._arrivals.values():
        coming = set(_numbers(arrivals, arrival.transfers))
        assert set(arrival.filling) <= coming, "no transfer brings a page"
        for node in arrival.filling.values():
            failed = may_fail and node.state is PageState.FAILED
            assert failed or node.state is PageState.ARRIVING
            assert node.filler == arrival.sequence.id
            fillers[node.page] = arrival.sequence.id
    for arrival in arrivals._arrivals.values():
        for node in arrival.awaited.values():
            # A row that waited for what the store could not give will fetch it.
            failed = node.state is PageState.FAILED
            assert not failed or may_fail, "somebody waits for a page that has failed"
            filled = node.page in fillers or node.page in fetched
            assert failed or node.state is PageState.READY or filled, "nobody fills a page"
    for node in core.cache._index._by_page.values():
        if node.state is PageState.ARRIVING:
            filler = fillers.get(node.page, fetched.get(node.page))
            assert filler == node.filler, "an arriving page has no filler"


def _numbers(arrivals: Any, transfers: set[int]) -> Iterator[int]:
    for transfer in transfers:
        yield from arrivals._transfers[transfer].numbers
