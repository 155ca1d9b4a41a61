"""One suite for all ends of connectors: what was asked for arrives, or an error says why not."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import msgspec
import numpy as np
import pytest
from aiohttp import web

from pshare_jax.core.connector import TransferError, TransferState
from pshare_jax.core.messages import PageDescriptor
from pshare_jax.core.plans import Offer, Pull
from pshare_jax.kv import ahead as kv_ahead
from pshare_jax.kv import direct as kv_direct
from pshare_jax.kv import remote as kv_remote
from pshare_jax.kv.direct import DirectOffers
from pshare_jax.kv.local import SamePool
from pshare_jax.kv.offers import PREFIX, take
from pshare_jax.runtime.programs import Programs
from pshare_jax.serve.worker_app import claim_pages, send_pages
from pshare_jax.sharding.mesh import carve
from tests.cluster.harness import TOKEN, Loop
from tests.engine.harness import wait_until
from tests.kv.ends import NUM_PAGES, Link, contents_of, fill, programs_of

COUNTS = (0, 1, 5, 70)
"""Nothing, a piece of each kind, and more than fits the largest bucket, with padding."""


@pytest.fixture(scope="module")
def direct() -> Iterator[list[DirectOffers]]:
    """Of two processes, which are patient: the machine may be busy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_direct, "PULL_SECONDS", 60.0)
        yield [DirectOffers("127.0.0.1") for _ in range(2)]


@pytest.fixture(scope="module")
def pages_server(
    tmp_path_factory: pytest.TempPathFactory, direct: list[DirectOffers]
) -> Iterator[tuple[Path, str]]:
    """A folder of offers that is another host's, and the URL where that serves them."""
    folder = tmp_path_factory.mktemp("host")
    loop, app = Loop(), web.Application()

    async def serve(request: web.Request) -> web.StreamResponse:
        assert request.headers["Authorization"] == f"Bearer {TOKEN}"
        (found,) = (folder / "prefill0").glob(f"{PREFIX}*")
        return await send_pages(request, found)

    async def claim(request: web.Request) -> web.StreamResponse:
        assert request.headers["Authorization"] == f"Bearer {TOKEN}"
        return await claim_pages(request, direct[0])

    app.router.add_get("/pages/{transfer:[0-9a-f]{16}}", serve)

    async def settle(request: web.Request) -> web.StreamResponse:
        direct[0].settle(int(request.match_info["transfer"], 16))
        return web.Response()

    app.router.add_post("/pages/{transfer:[0-9a-f]{16}}/claim", claim)
    app.router.add_delete("/pages/{transfer:[0-9a-f]{16}}/claim", settle)
    runner = web.AppRunner(app, access_log=None)
    loop.run(runner.setup())
    loop.run(web.TCPSite(runner, "127.0.0.1", 0).start())
    yield folder, f"http://127.0.0.1:{runner.addresses[0][1]}"
    loop.run(runner.cleanup())
    loop.close()


@pytest.fixture(scope="module")
def two_meshes() -> list[Programs]:
    prefill, decode = carve(jax.devices(), 1, 1, 1, 1)
    return [programs_of(prefill[0]), programs_of(decode[0])]


@pytest.fixture(params=["device_put", "same-mesh", "shm", "http", "jax-transfer"])
def link(
    request: pytest.FixtureRequest,
    two_meshes: list[Programs],
    tmp_path: Path,
    pages_server: tuple[Path, str],
    direct: list[DirectOffers],
) -> Iterator[Link]:
    """Both ends. At the end nothing is on offer, and nothing is on its way."""
    match request.param:
        case "device_put":
            link = Link("device_put", two_meshes)
        case "same-mesh":
            link = Link("same-mesh", two_meshes[:1])
        case "shm":
            link = Link("shm", two_meshes, tmp_path)
        case "jax-transfer":
            link = Link("jax-transfer", two_meshes, *pages_server, direct)
        case _:
            link = Link("http", two_meshes, *pages_server)
    yield link
    link.withdraw()
    assert len(link.exchange) == 0
    assert link.sender.num_arriving == link.receiver.num_arriving == 0
    link.close()


@pytest.fixture
def untouched(link: Link) -> Iterator[None]:
    """Both pools keep every bit."""
    before = contents_of(link.source), contents_of(link.target)
    yield
    np.testing.assert_array_equal(contents_of(link.source), before[0])
    np.testing.assert_array_equal(contents_of(link.target), before[1])


@pytest.mark.parametrize("count", COUNTS)
def test_any_number_of_pages_moves(link: Link, count: int) -> None:
    """Wherever they lie and go to; no other page of either pool changes."""
    rng = np.random.default_rng(count)
    pages = rng.permutation(np.arange(1, 81))[:count]
    pull = link.offer(pages.tolist())
    targets = rng.permutation(np.arange(81, NUM_PAGES))[:count]
    source, expected = contents_of(link.source), contents_of(link.target)
    expected[:, targets - 1] = source[:, pages - 1]
    link.move(msgspec.structs.replace(pull, targets=targets.tolist()))
    np.testing.assert_array_equal(contents_of(link.target), expected)
    if link.moves:
        np.testing.assert_array_equal(contents_of(link.source), source)


def test_what_is_offered_is_described(link: Link) -> None:
    pull = link.offer([3, 4])
    assert [d.key for d in pull.descriptors] == [b"key 3", b"key 4"]
    first = pull.descriptors[0]
    assert (first.layers, first.shape, first.dtype, first.codec) == (
        (0, 2),
        (2, 2, 8, 16),
        "float32",
        "raw",
    )
    sums = {d.checksum for d in pull.descriptors}
    assert len(sums) == (2 if link.moves else 1)
    link.move(pull)


def test_offers_keep_what_the_pages_held(link: Link) -> None:
    """Between meshes, pages that were given away after the offer do not spoil it."""
    if not link.moves:
        link.move(link.offer([7]))
        np.testing.assert_array_equal(
            contents_of(link.source)[:, 6], contents_of(link.source)[:, 80]
        )
        return
    held = contents_of(link.source)[:, 6]
    pull = link.offer([7])
    fill(link.sender._programs, link.source, 9)
    link.move(pull)
    np.testing.assert_array_equal(contents_of(link.target)[:, 80], held)


def test_several_transfers_at_once(link: Link) -> None:
    """They end in another order than they began in."""
    expected = contents_of(link.source)
    pulls = [link.offer(pages) for pages in ([1, 2, 3, 4, 5], [6], [7, 8])]
    for i, pull in enumerate(pulls):
        targets = [100 + 10 * i + j for j in range(len(pull.keys))]
        pulls[i] = msgspec.structs.replace(pull, targets=targets)
        link.receiver.accept(pulls[i])
    for pull in reversed(pulls):
        link.receiver.commit(pull.transfer)
    got = contents_of(link.target)
    np.testing.assert_array_equal(got[:, 99:104], expected[:, :5])
    np.testing.assert_array_equal(got[:, 109], expected[:, 5])
    np.testing.assert_array_equal(got[:, 119:121], expected[:, 6:8])


@pytest.mark.usefixtures("untouched")
class TestFailures:
    """Each ends in an error that names the transfer, and leaves nothing behind."""

    def test_never_offered(self, link: Link) -> None:
        with pytest.raises(TransferError, match="transfer 77: nothing is on offer"):
            link.move(link.pull(77))

    @pytest.mark.parametrize("what", ["poll", "commit"])
    def test_never_accepted(self, link: Link, what: str) -> None:
        with pytest.raises(TransferError, match="transfer 77 was not accepted, or has ended"):
            getattr(link.receiver, what)(77)

    def test_offered_twice(self, link: Link) -> None:
        pull = link.offer([1])
        with pytest.raises(TransferError, match="transfer 1 is on offer already"):
            link.sender.offer(Offer(1, "decode0", [2], [b"key 2"]))
        link.sender.abort(pull.transfer)

    def test_accepted_twice(self, link: Link) -> None:
        """The first time counts."""
        pull = link.offer([1])
        link.receiver.accept(pull)
        with pytest.raises(TransferError, match="transfer 1: nothing is on offer"):
            link.receiver.accept(pull)
        wait_until(lambda: link.receiver.poll(1) is TransferState.READY)
        link.receiver.abort(1)

    def test_the_sender_has_failed(self, link: Link) -> None:
        pull = link.offer([1, 2])
        link.exchange.drop_worker("decode0")
        assert len(link.exchange) == 1, "an offer of another worker stays"
        link.exchange.drop_worker("prefill0")
        with pytest.raises(TransferError, match="transfer 1: nothing is on offer"):
            link.move(pull)

    def test_the_sender_withdraws(self, link: Link) -> None:
        pull = link.offer([1, 2])
        link.sender.abort(pull.transfer)
        link.sender.abort(pull.transfer)
        with pytest.raises(TransferError, match="nothing is on offer"):
            link.move(pull)

    def test_the_receiver_gives_up(self, link: Link) -> None:
        pull = link.offer([1, 2])
        link.receiver.accept(pull)
        link.receiver.abort(pull.transfer)
        for ended in (link.receiver.poll, link.receiver.commit):
            with pytest.raises(TransferError, match="transfer 1 was not accepted, or has ended"):
                ended(pull.transfer)

    def test_the_receiver_gives_up_before_it_has_begun(self, link: Link) -> None:
        pull = link.offer([1, 2])
        link.receiver.abort(pull.transfer)
        link.withdraw()
        with pytest.raises(TransferError, match="nothing is on offer"):
            link.move(pull)

    @pytest.mark.parametrize(
        ("field", "value", "error"),
        [
            ("key", b"\x01\x02", f"page 1: key 0102 is on offer, not {b'key 2'.hex()}"),
            ("layers", (0, 1), r"page 1: layers is \(0, 1\), but this pool has \(0, 2\)"),
            ("shape", (2, 2, 16, 16), r"page 1: shape is \(2, 2, 16, 16\), but .* \(2, 2, 8, 16\)"),
            ("dtype", "bfloat16", "page 1: dtype is bfloat16, but this pool has float32"),
            ("codec", "int8", "page 1: codec is int8, but this pool has raw"),
        ],
    )
    def test_not_what_was_asked_for(
        self, link: Link, field: str, value: object, error: str
    ) -> None:
        pull = link.offer([1, 2, 3])
        pull.descriptors[1] = msgspec.structs.replace(pull.descriptors[1], **{field: value})
        with pytest.raises(TransferError, match=f"transfer 1, {error}"):
            link.receiver.accept(pull)

    @pytest.mark.parametrize(
        ("change", "error"),
        [
            (lambda pull: pull.descriptors.pop(), "2 pages are on offer, 3 were asked for"),
            (lambda pull: pull.keys.pop(), "3 pages are on offer, 2 were asked for"),
            (lambda pull: pull.targets.pop(), "3 pages are on offer for 3 keys and 2 places"),
            (lambda pull: pull.targets.append(9), "3 pages are on offer for 3 keys and 4 places"),
        ],
    )
    def test_another_number_of_pages(
        self, link: Link, change: Callable[[Pull], None], error: str
    ) -> None:
        pull = link.offer([1, 2, 3])
        change(pull)
        with pytest.raises(TransferError, match=f"transfer 1: {error}"):
            link.receiver.accept(pull)

    def test_fewer_pages_than_were_described(self, link: Link) -> None:
        """Descriptors and keys agree, but the exchange has another number of pages."""
        pull = link.offer([1, 2, 3])
        more: list[PageDescriptor] = [*pull.descriptors, pull.descriptors[0]]
        keys, targets = [*pull.keys, pull.keys[0]], [*pull.targets, 99]
        pull = Pull(1, "prefill0", more, keys, targets, pull.address)
        with pytest.raises(TransferError, match="3 pages are on offer for 4 keys and 4 places"):
            link.move(pull)

    def test_another_sender(self, link: Link) -> None:
        pull = msgspec.structs.replace(link.offer([1]), source="prefill1")
        with pytest.raises(TransferError, match="transfer 1: prefill0 offers it, not prefill1"):
            link.receiver.accept(pull)


def test_commit_ends_a_transfer(link: Link) -> None:
    """A second commit writes nothing, though the pages might have been given to others."""
    pull = link.offer([1, 2])
    link.move(pull)
    fill(link.receiver._programs, link.target, 8)
    before = contents_of(link.target)
    for ended in (link.receiver.poll, link.receiver.commit):
        with pytest.raises(TransferError, match="transfer 1 was not accepted, or has ended"):
            ended(pull.transfer)
    np.testing.assert_array_equal(contents_of(link.target), before)


@pytest.mark.parametrize("kind", ["device_put", "shm"])
@pytest.mark.parametrize(("count", "page"), [(1, 0), (5, 4), (70, 0), (70, 37), (70, 69)])
def test_a_bit_that_flips_on_the_way_is_found(
    two_meshes: list[Programs], tmp_path: Path, kind: str, count: int, page: int
) -> None:
    """Nothing of the transfer is written, not even the pages that are as they should be."""
    link = Link(kind, two_meshes, tmp_path if kind == "shm" else None)
    pull, before = link.offer(list(range(1, 1 + count))), contents_of(link.target)
    link.flip(pull.transfer, page, count)
    link.receiver.accept(pull)
    said = pull.descriptors[page].checksum
    error = f"transfer 1, page {page}: its checksum is [0-9a-f]{{8}}, but {said:08x} was offered"
    with pytest.raises(TransferError, match=error):
        link.receiver.commit(pull.transfer)
    np.testing.assert_array_equal(contents_of(link.target), before)
    with pytest.raises(TransferError, match="was not accepted, or has ended"):
        link.receiver.poll(pull.transfer)
    assert (len(link.exchange), link.receiver.num_arriving) == (0, 0)
    link.close()


def test_one_pool_takes_no_pages_of_another(two_meshes: list[Programs]) -> None:
    """With several shared pools a page number means nothing in the pool next door."""
    links = [Link("same-mesh", two_meshes[:1]) for _ in range(2)]
    other = SamePool("prefill1", two_meshes[0], links[1].target, links[0].exchange)
    pull, before = links[0].offer([1]), contents_of(links[1].target)
    with pytest.raises(TransferError, match="prefill0 are in another pool than those of prefill1"):
        other.accept(pull)
    np.testing.assert_array_equal(contents_of(links[1].target), before)
    assert (len(links[0].exchange), other.num_arriving) == (0, 0)


@pytest.mark.parametrize("link", ["shm", "http", "jax-transfer"], indirect=True)
class TestReadAhead:
    """Between processes pages are read when it is heard that they are on offer."""

    def test_they_are_there_when_they_are_accepted(self, link: Link) -> None:
        """Whoever waits is told, and has nothing more to wait for."""
        pages = list(range(1, 71))
        told = threading.Event()
        link.receiver.on_arrival = told.set
        pull = link.offer(pages)
        link.receiver.read_ahead(pull.transfer, pull.address, len(pages))
        assert told.wait(60)
        assert not link.receiver.has_arrived(), "nothing was accepted"
        link.receiver.accept(pull)
        assert link.receiver.has_arrived()
        assert link.receiver.poll(pull.transfer) is TransferState.READY
        link.receiver.commit(pull.transfer)
        there, here = contents_of(link.source), contents_of(link.target)
        assert np.array_equal(here[:, 80:150], there[:, :70])
        assert not link.receiver.has_arrived()

    def test_who_accepts_first_is_told_as_well(self, link: Link) -> None:
        told = threading.Event()
        link.receiver.on_arrival = told.set
        pull = link.offer([3, 5])
        link.receiver.accept(pull)
        assert told.wait(60)
        assert link.receiver.has_arrived()
        link.receiver.commit(pull.transfer)

    def test_what_was_flipped_is_found(self, link: Link) -> None:
        pull = link.offer([3, 5])
        link.flip(pull.transfer, 1, 2)
        link.receiver.read_ahead(pull.transfer, pull.address, 2)
        link.receiver.accept(pull)
        with pytest.raises(TransferError, match="page 1: its checksum is"):
            link.receiver.commit(pull.transfer)

    def test_nobody_wants_it(self, link: Link) -> None:
        pull = link.offer([3, 5])
        link.receiver.read_ahead(pull.transfer, pull.address, 2)
        link.receiver.abort(pull.transfer)
        assert len(link.receiver._ahead) == 0

    def test_what_is_wrong_is_said_when_it_is_accepted(self, link: Link) -> None:
        link.receiver.read_ahead(7, "no address", 1)
        link.receiver.read_ahead(77, link.pull(77).address, 1)
        with pytest.raises(TransferError, match="transfer 77"):
            link.move(link.pull(77))

    def test_what_has_no_room_is_read_when_it_is_accepted(
        self, link: Link, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Neither of the two is lost: one was read ahead, the other one is on offer still."""
        monkeypatch.setattr(kv_ahead, "MAX_BYTES", 2 * link.receiver._size(2))
        expected = contents_of(link.source)
        pulls = [link.offer([3, 5]), link.offer([7, 9])]
        pulls[1] = msgspec.structs.replace(pulls[1], targets=[91, 92])
        for pull in pulls:
            link.receiver.read_ahead(pull.transfer, pull.address, 2)
        assert len(link.receiver._ahead) == 1
        for pull in pulls:
            link.move(pull)
        got = contents_of(link.target)
        assert np.array_equal(got[:, [80, 81, 90, 91]], expected[:, [2, 4, 6, 8]])

    def test_no_copy_stays_in_the_hosts_memory(self, link: Link) -> None:
        pull = link.offer([3, 4, 5, 6, 7])
        link.receiver.read_ahead(pull.transfer, pull.address, 5)
        link.receiver.accept(pull)
        found = link.receiver._arriving[pull.transfer].reading.result()
        assert len(found.read.pieces) == 0
        assert sum(p.nbytes for p in found.staged) == link.receiver._size(5), "with its padding"
        link.receiver.commit(pull.transfer)

    def test_an_end_that_is_closed_reads_no_more(self, link: Link) -> None:
        pull = link.offer([3, 5])
        link.receiver.close()
        link.receiver.read_ahead(pull.transfer, pull.address, 2)
        assert len(link.receiver._ahead) == 0
        with pytest.raises(TransferError, match="transfer 1: "):
            link.receiver.accept(pull)


class Taken:
    """Remembers which files of offers were opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self._files: list[tuple[int, int]] = []
        monkeypatch.setattr(kv_remote, "take", self._take)

    def _take(self, folder: Path, transfer: int) -> int:
        file = take(folder, transfer)
        self._files.append((file, os.fstat(file).st_ino))
        return file

    def open(self) -> list[int]:
        """Those that are open still; their numbers may have gone to others."""
        found = []
        for file, inode in self._files:
            with contextlib.suppress(OSError):
                if os.fstat(file).st_ino == inode:
                    found.append(file)
        assert self._files, "none was opened"
        return found


@contextlib.contextmanager
def busy(threads: ThreadPoolExecutor) -> Iterator[None]:
    """All of them wait for something."""
    free, waits = threading.Event(), threading.Semaphore(0)

    def wait() -> None:
        waits.release()
        free.wait(60)

    for _ in range(kv_remote.READERS):
        threads.submit(wait)
    for _ in range(kv_remote.READERS):
        assert waits.acquire(timeout=60)
    try:
        yield
    finally:
        free.set()


@pytest.mark.parametrize("link", ["shm"], indirect=True)
class TestFilesOfTheHost:
    def test_none_is_left_open_by_an_end_that_is_closed(
        self, link: Link, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        taken, pull = Taken(monkeypatch), link.offer([3, 5])
        link.receiver.close()
        link.receiver.read_ahead(pull.transfer, pull.address, 2)
        assert taken.open() == []

    def test_none_is_left_open_that_is_given_up_before_it_is_read(
        self, link: Link, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        taken, pulls = Taken(monkeypatch), [link.offer([3, 5]), link.offer([7])]
        with busy(link.receiver._file_readers):
            link.receiver.read_ahead(pulls[0].transfer, pulls[0].address, 2)
            link.receiver.accept(pulls[1])
            assert len(taken.open()) == 2
            for pull in pulls:
                link.receiver.abort(pull.transfer)
            assert taken.open() == []

    def test_they_do_not_wait_for_other_processes(self, link: Link) -> None:
        with busy(link.receiver._readers):
            link.move(link.offer([3, 5]))

    def test_those_of_a_plan_are_waited_for_together(
        self, link: Link, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        waits: list[float] = []

        def wait(_: object, seconds: float) -> None:
            waits.append(seconds)
            now[0] += seconds

        now = [100.0]
        monkeypatch.setattr(kv_remote, "wait", wait)
        monkeypatch.setattr(link.receiver, "_clock", lambda: now[0])
        pulls = [link.offer([page]) for page in (3, 5, 7)]
        for pull in pulls[:2]:
            link.receiver.accept(pull)
        link.receiver.poll(pulls[0].transfer)
        link.receiver.accept(pulls[2])
        assert waits == pytest.approx([kv_remote.SOON_SECONDS, 0.0, kv_remote.SOON_SECONDS])
        for pull in pulls:
            link.receiver.abort(pull.transfer)


@pytest.mark.parametrize("link", ["shm"], indirect=True)
def test_a_file_of_the_host_is_waited_for_a_moment(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no piece of work comes between."""
    monkeypatch.setattr(kv_remote, "SOON_SECONDS", 60.0)
    pull = link.offer([3, 5])
    link.receiver.accept(pull)
    assert link.receiver.has_arrived()
    link.receiver.commit(pull.transfer)
