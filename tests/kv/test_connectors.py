"""One suite for all ends of connectors: what was asked for arrives, or an error says why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from pshare_jax.core.connector import TransferError, TransferState
from pshare_jax.core.messages import PageDescriptor
from pshare_jax.core.plans import Offer, Pull
from pshare_jax.kv.local import SamePool
from pshare_jax.runtime.programs import Programs
from tests.engine.harness import wait_until
from tests.kv.ends import NUM_PAGES, Link, contents_of, fill

COUNTS = (0, 1, 5, 70)
"""Nothing, a piece of each kind, and more than fits the largest bucket, with padding."""


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
