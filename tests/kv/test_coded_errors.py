"""Coded pages that are not what they should be: an error that is counted, nothing is written."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import msgspec
import numpy as np
import pytest
import xxhash

from pshare_jax.core.arrivals import TRANSFER_SECONDS
from pshare_jax.core.connector import TransferError
from pshare_jax.kv.coding import (
    Coding,
    CodingError,
    PageCoder,
    Wanted,
    read_coding,
    read_wanted,
)
from pshare_jax.kv.direct import DirectOffers
from pshare_jax.kv.peers import Claimed
from pshare_jax.kv.reading import HEAD, _Stream
from pshare_jax.serve import worker_app
from tests.kv.coded import PAGE_BYTES, Pair, Server, realistic


class TestHostile:
    """Nothing of a transfer that is not what it should be gets into the pool; it is counted by
    what was wrong, and the next ones come as they are."""

    def refused(self, pair: Pair, reason: str, error: str, count: int = 5) -> None:
        before = pair.bits()
        with pytest.raises(TransferError, match=error):
            pair.move(count)
        np.testing.assert_array_equal(pair.bits(), before)
        assert dict(pair.reader.traffic.refused) == ({reason: 1} if reason else {})
        assert pair.reader.num_arriving == 0

    def pair(self, new_pair: Callable[..., Pair]) -> Pair:
        """With a codebook that both have."""
        pair = new_pair("http")
        pair.fill(realistic(1))
        pair.move(5)
        return pair

    @pytest.mark.parametrize(
        ("mangle", "reason", "error"),
        [
            (lambda f: [_flip(f[0], 700), *f[1:]], "record", "page 0: its digest is another one"),
            (lambda f: [*f[:4], _flip(f[4], 5)], "record", "page 4: its digest is another one"),
            (lambda f: [_framed(_flip(f[0][12:], 700)), *f[1:]], "checksum", "page 0: its check"),
            (lambda f: [*f[:4], _framed(_flip(f[4][12:], 0))], "checksum", "page 4: its check"),
            (lambda f: [_framed(f[0][12:-2]), *f[1:]], "record", "page 0: .* bytes are not what"),
            (lambda f: [f[0], _framed(f[1][12:] + b"\0"), *f[2:]], "record", "page 1: .* are not"),
            (lambda f: [_framed(b""), *f[1:]], "record", "page 0: a record of 0 bytes"),
            (lambda f: [HEAD.pack(1 << 31, 0), *f], "record", "a record of 2147483648 bytes"),
            (lambda f: [_framed(f[0][12:] * 2), *f], "record", "page 0: a record of"),
            (lambda f: [*f, f[0]], "record", "more follows after 5 pages"),
            (lambda f: [f[1], f[0], *f[2:]], "checksum", "page 0: its checksum is"),
            (lambda f: [_framed(b"\0" * PAGE_BYTES), *f[1:]], "checksum", "page 0: its checksum"),
        ],
        ids=[
            "flipped bit",
            "flipped digest",
            "flipped bit before it was framed",
            "flipped bit in the last page",
            "shorter record",
            "longer record",
            "empty record",
            "endless record",
            "twice the record",
            "a page more",
            "pages in another order",
            "zeros as they are",
        ],
    )
    def test_records(
        self,
        new_pair: Callable[..., Pair],
        monkeypatch: pytest.MonkeyPatch,
        mangle: Callable[[list[bytes]], list[bytes]],
        reason: str,
        error: str,
    ) -> None:
        pair, plain = self.pair(new_pair), worker_app.coded_frames
        monkeypatch.setattr(
            worker_app, "coded_frames", lambda *args: iter(mangle([bytes(f) for f in plain(*args)]))
        )
        self.refused(pair, reason, error)
        raw = pair.bytes_of("raw")
        pair.move(5)
        assert pair.bytes_of("raw")[0] == raw[0] + 5 * PAGE_BYTES, "as they are, for a while"

    def test_fewer_pages(
        self, new_pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its sender may have died: that says nothing of the codec."""
        pair, plain = self.pair(new_pair), worker_app.coded_frames
        monkeypatch.setattr(
            worker_app, "coded_frames", lambda *args: iter([bytes(f) for f in plain(*args)][:-1])
        )
        self.refused(pair, "", "it ends too early|does not answer")

    @pytest.mark.parametrize("at", [0, 17])
    def test_the_codebook(
        self, new_pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, at: int
    ) -> None:
        pair, plain = new_pair("http"), worker_app.coded_frames
        pair.fill(realistic(1))

        def frames(*args: Any) -> Iterator[bytes]:
            table, *rest = (bytes(frame) for frame in plain(*args))
            return iter([_flip(table, at), *rest])

        monkeypatch.setattr(worker_app, "coded_frames", frames)
        self.refused(pair, "book", "which are not codebook")

    @pytest.mark.parametrize(
        ("change", "reason", "error"),
        [
            ({"codec": "zip"}, "codec", "it comes as zip, unasked"),
            ({"codec": "raw"}, "codec", "it comes as raw, unasked"),
            ({"book": "beef"}, "book", "codebook beef has not been sent"),
            ({"book": "beef", "table": True}, "book", "are not codebook beef"),
            ({"ratio": "large"}, "answer", "Pshare-Codec of the answer: "),
        ],
        ids=["unknown codec", "raw", "no codebook", "another codebook", "no header"],
    )
    def test_what_the_answer_says(
        self,
        new_pair: Callable[..., Pair],
        monkeypatch: pytest.MonkeyPatch,
        change: dict[str, Any],
        reason: str,
        error: str,
    ) -> None:
        pair = self.pair(new_pair)

        def header(coding: Coding) -> str:
            return msgspec.json.encode(msgspec.to_builtins(coding) | change).decode()

        monkeypatch.setattr(Coding, "header", header)
        self.refused(pair, reason, error)

    def test_coded_though_nobody_has_asked_for_it(
        self, new_pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pair = self.pair(new_pair)
        assert pair.server.coder is not None
        coding = pair.server.coder.coding
        assert coding is not None
        coded = msgspec.structs.replace(coding, coded=True)
        monkeypatch.setattr(PageCoder, "answer", lambda self, wanted: coded)
        reader = pair.reader._reader
        monkeypatch.setattr(reader.coded.links, "wanted", lambda *args: Wanted(["planes"], False))
        self.refused(pair, "codec", "it comes as planes, unasked")
        monkeypatch.setattr(reader.coded.links, "wanted", lambda *args: None)
        with pytest.raises(TransferError, match="it comes as planes, unasked"):
            pair.move(5)

    @pytest.mark.parametrize(
        ("change", "reason", "error"),
        [
            (lambda c: {"lengths": []}, "record", "are not its records"),
            (lambda c: {"lengths": [c.lengths[0][:-1], *c.lengths[1:]]}, "record", "not its rec"),
            (lambda c: {"lengths": [[1 << 40, *c.lengths[0][1:]]]}, "record", "records of"),
            (lambda c: {"lengths": [[-1, *c.lengths[0][1:]]]}, "record", "records of"),
            (lambda c: {"lengths": [[c.lengths[0][0] - 1, *c.lengths[0][1:]]]}, "record", "bytes"),
            (lambda c: {"coding": _with(c, book="beef")}, "book", "beef has not been sent"),
            (lambda c: {"coding": _with(c, codec="zip")}, "codec", "it comes as zip, unasked"),
            (lambda c: {"coding": _with(c, table=True), "table": b"\1"}, "book", "1 bytes came"),
        ],
        ids=[
            "no lengths",
            "fewer lengths",
            "a long record",
            "less than nothing",
            "a shorter record",
            "another codebook",
            "unknown codec",
            "a short codebook",
        ],
    )
    def test_claims(
        self,
        new_pair: Callable[..., Pair],
        coded_server: Server,
        change: Callable[[Claimed], dict[str, Any]],
        reason: str,
        error: str,
    ) -> None:
        pair = new_pair("jax-transfer")
        pair.fill(realistic(1))
        pair.move(4)
        assert pair.bytes_of("planes")[0] == 4 * PAGE_BYTES
        coded_server.claimed = lambda claimed: msgspec.structs.replace(claimed, **change(claimed))
        self.refused(pair, reason, error, count=4)

    def test_a_flipped_bit_from_device_to_device(
        self, new_pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pair, plain = new_pair("jax-transfer"), DirectOffers.pull
        pair.fill(realistic(1))
        pair.move(4)

        def pull(self: DirectOffers, claimed: Claimed, pieces: Any) -> list[jax.Array]:
            (rows,) = plain(self, claimed, pieces)
            flipped = np.array(rows)
            flipped[2, 100] ^= 1
            return [jax.device_put(flipped, rows.sharding)]

        monkeypatch.setattr(DirectOffers, "pull", pull)
        self.refused(pair, "checksum", "page 2: its checksum is", count=4)


def _with(claimed: Claimed, **change: Any) -> Coding:
    assert claimed.coding is not None
    return msgspec.structs.replace(claimed.coding, **change)


def _flip(data: bytes, at: int) -> bytes:
    flipped = bytearray(data)
    flipped[at] ^= 1
    return bytes(flipped)


def _framed(record: bytes) -> bytes:
    return HEAD.pack(len(record), xxhash.xxh3_64_intdigest(record)) + record


@pytest.mark.parametrize("coded", [False, True])
def test_what_nobody_waits_for_any_more_is_not_read_to_its_end(
    new_pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, *, coded: bool
) -> None:
    """A link that is too slow is not kept busy, nor is the thread that reads."""
    pair = new_pair("http", *(("planes", "planes") if coded else ("raw", "raw")))
    pair.fill(realistic(1))
    pair.move(5)
    now = itertools.count(step=TRANSFER_SECONDS)
    monkeypatch.setattr(pair.reader._reader, "_clock", lambda: float(next(now)))
    pull = pair.offer(5)
    with pytest.raises(TransferError, match="it has not come within 10 s"):
        pair.reader._reader.from_url(pull.transfer, pair.server.url, 5)


class Trickle:
    """An answer of which a byte comes at a time; to wait for all of it is to wait for days."""

    def __init__(self) -> None:
        self.now = 0.0

    def readinto1(self, into: memoryview) -> int:
        self.now += 9.0
        into[0] = 0
        return 1

    def readinto(self, into: memoryview) -> int:
        raise AssertionError("this waits until the buffer is full")


def test_who_trickles_is_not_waited_for() -> None:
    source = Trickle()
    stream = _Stream(1, cast(Any, source), lambda: source.now)
    with pytest.raises(TransferError, match="it has not come within 10 s"):
        stream.fill(memoryview(bytearray(1_000_000)))
    assert source.now == 18.0


@pytest.mark.parametrize("field", ["encode", "decode", "ratio"])
@pytest.mark.parametrize("value", [0, -1])
def test_rates_that_cannot_be_are_refused(field: str, value: float) -> None:
    """Prices are divided by them."""
    said = {"codec": "planes", "book": "x", "encode": 1.0, "decode": 1.0, "ratio": 1.4}
    with pytest.raises(CodingError):
        read_coding(json.dumps(said | {field: value}))


@pytest.mark.parametrize("header", [None, "", "{", "[]", '{"codecs": 3}', "\xff" * 9])
def test_what_cannot_be_understood_is_answered_with_pages_as_they_are(header: str | None) -> None:
    assert read_wanted(header) is None
