"""Moving pages; reservations and arrivals on a decode engine that is not started, step by step."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from pshare_jax.engine.decode import DecodeEngine
from pshare_jax.engine.handoff import Receiver, Sender, Staged
from pshare_jax.engine.sequence import Sequence

from pshare_jax.core.admission import Reservation
from pshare_jax.core.messages import Request
from pshare_jax.engine.orchestrator import Orchestrator
from pshare_jax.runtime.layout import PageLayout
from pshare_jax.runtime.pool import PagePool
from tests.engine.harness import Models, serve_config
from tests.helpers import tiny_config


def test_any_number_of_pages_moves() -> None:
    """More than the largest bucket in several pieces; padding harms no page."""
    source, target = (SingleDeviceSharding(device) for device in jax.devices()[:2])
    layout = PageLayout(2, 1, 4, 2, jnp.float32)
    here, there = PagePool(layout, 100, source), PagePool(layout, 100, target)
    here.own()
    there.own()
    rng = np.random.default_rng(0)
    contents = rng.normal(size=(2, *layout.layer_shape(100))).astype(np.float32)
    here.update(lambda pages: (tuple(jax.device_put(c, source) for c in contents), None))
    sender, receiver = Sender(source, "auto"), Receiver(target, "auto")
    expected = np.zeros_like(contents)
    for count in (0, 1, 5, 70):
        pages = rng.permutation(np.arange(1, 100))
        sent, wanted = pages[:count], rng.permutation(pages)[:count]
        receiver.store(there, sender.move(here, sent.tolist(), wanted.tolist(), target))
        expected[:, wanted] = contents[:, sent]
        got = there.read(lambda pages: np.stack([np.asarray(p) for p in pages]))
        np.testing.assert_array_equal(got[:, 1:], expected[:, 1:])


class Bench:
    """One decode engine, and pages of any contents for it."""

    def __init__(self, engine: Orchestrator):
        self.decode: DecodeEngine = engine._decode[0]
        self.decode._pool.own()
        self._model = engine._runtimes["full"]

    def sequence(self, order: int, prompt: list[int]) -> Sequence:
        return Sequence(
            Request(str(order), "full", tuple(prompt)),
            self._model,
            lambda event: None,
            order=order,
            seed=0,
            page_size=8,
            end_token_ids=frozenset(),
            on_finish=lambda sequence, reason: None,
        )

    def reserve(self, sequence: Sequence) -> Reservation:
        reservation = self.decode.admission.reserve(sequence)
        assert reservation is not None
        return reservation

    def cancel(self, reservation: Reservation) -> None:
        self.decode.admission.leave(reservation.slot, reservation.pages)

    def commit(self, sequence: Sequence, reservation: Reservation, value: float) -> None:
        """Sends pages full of `value`."""
        shape = self.decode._layout.layer_shape(1)
        staged = [
            Staged(np.full((2, *shape), value, np.float32), np.array([reservation.pages[i]]))  # type: ignore[arg-type]
            for i in reservation.fill
        ]
        self.decode.commit(sequence, reservation, staged)

    def contents(self, page: int) -> float:
        return self.decode._pool.read(lambda pages: float(pages[1][page].mean()))

    def running(self) -> list[int]:
        self.decode._receive()
        return [sequence.order for sequence in self.decode.running]


@pytest.fixture
def bench() -> Iterator[Bench]:
    models = Models(tiny_config())
    models.add_full("full", 1)
    engine = Orchestrator(serve_config(), models.base_source, models.sources)
    bench = Bench(engine)
    yield bench
    engine.stop()
    bench.decode.cache.check()


def test_pages_on_their_way_are_shared_and_waited_for(bench: Bench) -> None:
    first, second = bench.sequence(0, [5] * 20), bench.sequence(1, [5] * 20)
    one, two = bench.reserve(first), bench.reserve(second)
    assert one.pages[:2] == two.pages[:2], "19 tokens: two full pages are shared"
    assert one.pages[2] != two.pages[2], "the half-filled one is not"
    assert (one.fill, two.fill) == ([0, 1, 2], [2])
    assert two.awaited == one.arriving
    # The second one's page comes first, over another prefill engine.
    bench.commit(second, two, 2.0)
    assert bench.running() == []
    bench.commit(first, one, 1.0)
    assert sorted(bench.running()) == [0, 1]
    assert [bench.contents(page) for page in one.pages] == [1.0, 1.0, 1.0]
    assert [bench.contents(page) for page in two.pages] == [1.0, 1.0, 2.0]
    third = bench.reserve(bench.sequence(2, [5] * 17))
    assert (third.pages[:2], third.fill, third.awaited) == (one.pages[:2], [], [])


def test_a_cancelled_reservation_leaves_nothing(bench: Bench) -> None:
    free = bench.decode.cache.num_available
    inside = bench.decode.admission.num_inside
    bench.cancel(bench.reserve(bench.sequence(0, [5] * 20)))
    assert bench.decode.cache.num_available == free
    assert bench.decode.admission.num_inside == inside
    bench.decode.cache.check(idle=True)


def test_a_page_for_each_running_sequence_is_left_over(bench: Bench) -> None:
    """27 pages: two sequences of 12 and one of 2 leave one page where two are wanted."""
    for order in range(2):
        bench.reserve(bench.sequence(order, [order] * 96))
    assert bench.decode.admission.reserve(bench.sequence(2, [2] * 16)) is None
    assert bench.decode.admission.reserve(bench.sequence(2, [2] * 8)) is not None


def test_no_slot_no_reservation(bench: Bench) -> None:
    for order in range(8):
        bench.reserve(bench.sequence(order, [order]))
    assert bench.decode.admission.reserve(bench.sequence(8, [8])) is None


def test_a_refused_sequence_goes_before_younger_ones(bench: Bench) -> None:
    """With several prefill engines, a stream of small prompts could starve a large one."""
    held = bench.reserve(bench.sequence(0, [0] * 120))
    large, small = bench.sequence(1, [1] * 121), bench.sequence(2, [2])
    younger = bench.sequence(3, [3] * 122)
    for refused in (younger, large, small):
        assert bench.decode.admission.reserve(refused) is None
    oldest = bench.decode.admission.reserve(bench.sequence(-1, [9]))
    assert oldest is not None, "an older one is not held up"
    for reservation in (held, oldest):
        bench.cancel(reservation)
    bench.reserve(large)
    bench.reserve(small)
    assert bench.decode.admission.reserve(younger) is None
    assert bench.decode.admission.reserve(bench.sequence(4, [4])) is None
    younger.abort_requested = True
    bench.reserve(bench.sequence(4, [4]))


def test_a_full_pool_of_cached_pages_has_room(bench: Bench) -> None:
    """Pages that only the index holds are given up, but not those the newcomer shares."""
    for order in range(2):
        sequence = bench.sequence(order, [order] * 104)
        reservation = bench.reserve(sequence)
        bench.commit(sequence, reservation, float(order))
        assert bench.running() == [order]
        bench.decode._remove(bench.decode._rows[0])
    counts = bench.decode.cache.counts()
    assert (counts.used, counts.cached) == (0, 24)
    again = bench.reserve(bench.sequence(2, [0] * 104))
    assert again.fill == [12]
    bench.cancel(again)
    most = bench.reserve(bench.sequence(3, [*[0] * 32, *[7] * 95]))
    assert most.fill == list(range(4, 16))
    assert bench.contents(most.pages[0]) == 0.0


def test_who_gives_way_when_pages_run_out(bench: Bench) -> None:
    """The youngest, but for one that is still on its way: that one is younger."""
    for order in range(2):
        sequence = bench.sequence(order, [order] * 96)
        bench.commit(sequence, bench.reserve(sequence), 1.0)
    assert bench.running() == [0, 1]
    older, younger = bench.decode._rows
    arriving = bench.reserve(bench.sequence(2, [2] * 8))
    assert bench.decode.cache.allocate(2) is not None, "the last pages"
    assert not bench.decode._ensure_pages(younger, steps=4)
    assert bench.running() == [0, 1], "it waits for the one on its way"
    bench.cancel(arriving)
    assert bench.decode.cache.allocate(1) is not None
    assert not bench.decode._ensure_pages(younger, steps=4)
    assert bench.running() == [0], "it has gone back to be covered again"
    assert bench.decode._ensure_pages(older, steps=4)
    assert len(older.pages) == 13
