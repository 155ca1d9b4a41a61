"""Coded pages between processes: bit for bit what was offered, or an error that is counted."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
import xxhash
from aiohttp import web

from pshare_jax.config import DecodeConfig
from pshare_jax.core.arrivals import TRANSFER_SECONDS
from pshare_jax.core.connector import TransferError, TransferState
from pshare_jax.core.plans import Offer, Pull
from pshare_jax.errors import ConfigError
from pshare_jax.kernels.backends import on_mesh
from pshare_jax.kv import direct as kv_direct
from pshare_jax.kv import pulling
from pshare_jax.kv.coding import (
    Coding,
    CodingError,
    PageCoder,
    Wanted,
    read_coding,
    read_wanted,
)
from pshare_jax.kv.direct import DirectOffers
from pshare_jax.kv.offers import PREFIX, OfferFolder, file_of
from pshare_jax.kv.peers import Claimed, Peers
from pshare_jax.kv.reading import HEAD, _Stream
from pshare_jax.kv.records import Records
from pshare_jax.kv.remote import RemotePages
from pshare_jax.kv.ways import Way
from pshare_jax.runtime.layout import PageLayout
from pshare_jax.runtime.pool import PagePool
from pshare_jax.runtime.programs import Programs
from pshare_jax.runtime.steps import StepSpec
from pshare_jax.serve import worker_app
from pshare_jax.sharding.mesh import carve
from tests.cluster.harness import Loop
from tests.engine.harness import wait_until
from tests.helpers import tiny_config

NUM_PAGES = 80
CONFIG = tiny_config()
LAYOUT = PageLayout.of(CONFIG, 8, jnp.bfloat16)
SHAPE = (LAYOUT.num_layers, *LAYOUT.layer_shape(1)[1:])
PAGE_BYTES = LAYOUT.bytes_per_page
WAYS: tuple[Way, ...] = ("http", "jax-transfer")


def realistic(seed: int, count: int = NUM_PAGES) -> np.ndarray:
    """Bits of pages `[L, n, ...]` whose values' sizes go by their channels."""
    rng = np.random.default_rng(seed)
    sizes = np.random.default_rng(7).lognormal(0, 2, (SHAPE[0], 1, *SHAPE[1:3], 1, SHAPE[4]))
    values = rng.normal(0, 1, (SHAPE[0], count, *SHAPE[1:])) * sizes
    return values.astype(jnp.bfloat16).view(np.uint16)


@pytest.fixture(scope="module")
def programs() -> list[Programs]:
    decode = DecodeConfig(max_num_seqs=2, batch_buckets=[1])
    meshes = carve(jax.devices(), 1, 1, 1, 1)
    return [
        Programs(StepSpec(CONFIG, on_mesh("xla", mesh.size), mesh), LAYOUT, mesh, 64, [8], decode)
        for (mesh,) in meshes
    ]


@dataclass
class Server:
    """A process that has pages on offer; `mangle` changes what it sends of coded ones."""

    url: str
    folder: Path
    coder: PageCoder | None = None
    direct: DirectOffers | None = None
    mangle: Callable[[list[bytes]], list[bytes]] | None = None
    header: Callable[[Coding], str] = field(default=lambda coding: coding.header())
    claimed: Callable[[Claimed], Claimed] = field(default=lambda claimed: claimed)


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("host")
    loop, app = Loop(), web.Application()
    server = Server("", folder)

    async def serve(request: web.Request) -> web.StreamResponse:
        transfer = int(request.match_info["transfer"], 16)
        (found,) = (f for f in folder.glob(f"{PREFIX}*") if file_of(f, transfer).exists())
        return await worker_app.send_pages(request, found, server.coder)

    async def claim(request: web.Request) -> web.StreamResponse:
        answer = await worker_app.claim_pages(request, server.direct)
        assert isinstance(answer.body, bytes)
        said = msgspec.json.decode(answer.body, type=Claimed)
        return web.Response(body=msgspec.json.encode(server.claimed(said)))

    async def settle(request: web.Request) -> web.StreamResponse:
        return web.Response()

    app.router.add_get("/pages/{transfer:[0-9a-f]{16}}", serve)
    app.router.add_post("/pages/{transfer:[0-9a-f]{16}}/claim", claim)
    app.router.add_delete("/pages/{transfer:[0-9a-f]{16}}/claim", settle)
    runner = web.AppRunner(app, access_log=None)
    loop.run(runner.setup())
    loop.run(web.TCPSite(runner, "127.0.0.1", 0).start())
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield server
    loop.run(runner.cleanup())
    loop.close()


@pytest.fixture(scope="module")
def direct() -> Iterator[list[DirectOffers]]:
    with pytest.MonkeyPatch.context() as patch:
        # The machine may be busy.
        patch.setattr(kv_direct, "PULL_SECONDS", 60.0)
        yield [DirectOffers("127.0.0.1") for _ in range(2)]


class Pair:
    """Two processes: one has pages on offer, the other one reads them into its pool."""

    def __init__(
        self,
        way: Way,
        programs: list[Programs],
        server: Server,
        direct: list[DirectOffers],
        folder: Path,
        codecs: tuple[str, str] = ("planes", "planes"),
    ):
        self.way = way
        self.server = server
        sends, _ = codecs
        self.pools = [PagePool(LAYOUT, NUM_PAGES, own.pool_sharding) for own in programs]
        for pool in self.pools:
            pool.own()
        self.folders = [OfferFolder(server.folder), OfferFolder(folder)]
        mine = direct if way == "jax-transfer" else [None, None]
        how: Any = way if way == "jax-transfer" else "auto"
        self.sender, self.reader = (
            RemotePages(name, own, pool, offers, server.url, Peers(), one, how, codec)
            for name, own, pool, offers, one, codec in zip(
                ("prefill0", "decode0"), programs, self.pools, self.folders, mine, codecs,
                strict=True,
            )
        )  # fmt: skip
        self._coder = PageCoder(sends, SHAPE, "bfloat16")  # type: ignore[arg-type]
        self._direct = direct[0]
        self._transfer = np.random.default_rng().integers(1, 1 << 60)
        self.serve()

    def serve(self) -> None:
        """Has the server code as this one's sender does; there may be several pairs."""
        self.server.coder, self.server.direct = self._coder, self._direct
        self._direct.code_by(self._coder, self.sender.records)

    def fill(self, bits: np.ndarray) -> None:
        """Fills the sender's pool with pages `[L, n, ...]` from page 1 on."""
        shape = (SHAPE[0], NUM_PAGES + 1, *SHAPE[1:])
        values = np.zeros(shape, np.uint16)
        values[:, 1 : 1 + bits.shape[1]] = bits
        layers = [jax.device_put(v.view(jnp.bfloat16)[:NUM_PAGES]) for v in values]
        sharding = self.sender._programs.pool_sharding
        self.pools[0].update(lambda _: (tuple(jax.device_put(v, sharding) for v in layers), None))

    def bits(self) -> np.ndarray:
        """What the reader's pool holds from page 1 on."""
        pages = self.pools[1].read(lambda pages: np.stack([np.asarray(page) for page in pages]))
        return pages[:, 1:].view(np.uint16)

    def offer(self, count: int) -> Pull:
        self._transfer += 1
        transfer = int(self._transfer)
        keys = [b"key %d" % page for page in range(count)]
        reader = self.reader.reader("prefill0")
        pages = [*range(1, 1 + count)]
        descriptors = self.sender.offer(Offer(transfer, "decode0", pages, keys, reader))
        address = self.sender.address_of(transfer)
        assert self.way in address
        return Pull(transfer, "prefill0", descriptors, keys, pages, address)

    def move(self, count: int) -> None:
        pull = self.offer(count)
        self.reader.accept(pull)
        wait_until(lambda: self.reader.poll(pull.transfer) is TransferState.READY)
        self.reader.commit(pull.transfer)

    def bytes_of(self, codec: str) -> tuple[int, int]:
        """That have come by the way, coded so: as pages, and on the wire."""
        traffic = self.reader.traffic
        return traffic.raw[self.way, codec], traffic.wire[self.way, codec]

    def close(self) -> None:
        for end in (self.sender, self.reader):
            end.close()
        for folder in self.folders:
            folder.close()


@pytest.fixture
def new_pair(
    programs: list[Programs], serving: Server, direct: list[DirectOffers], tmp_path: Path
) -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(way: Way, *codecs: str) -> Pair:
        made.append(Pair(way, programs, serving, direct, tmp_path, codecs or ("planes", "planes")))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for pair in made:
        pair.close()
    serving.mangle, serving.header = None, lambda coding: coding.header()
    serving.claimed = lambda claimed: claimed


@pytest.mark.parametrize("codec", ["planes", "top16"])
@pytest.mark.parametrize("way", WAYS)
def test_pages_come_bit_for_bit(new_pair: Callable[..., Pair], way: Way, codec: str) -> None:
    """One page, a padded piece, and several pieces; the codebook is sent once."""
    pair = new_pair(way, codec, codec)
    bits, total, wire = realistic(1), 0, []
    pair.fill(bits)
    for count in (4, 1, 5, 40):
        pair.move(count)
        total += count
        np.testing.assert_array_equal(pair.bits()[:, :count], bits[:, :count])
        wire.append(pair.bytes_of(codec)[1])
    assert pair.bytes_of("raw") == (0, 0)
    assert pair.bytes_of(codec)[0] == total * PAGE_BYTES
    assert pair.reader.traffic.refused.total() == 0
    if way == "http":
        fewest = {"planes": 1 + 3 / 8, "top16": 1 + 4 / 8}[codec] / 2
        table = SHAPE[0] * 2 * SHAPE[2] * SHAPE[4] if codec == "planes" else 15
        assert table + 4 * PAGE_BYTES * fewest < wire[0] < table + 4 * PAGE_BYTES
        assert wire[1] - wire[0] < PAGE_BYTES, "the codebook is there already"


@pytest.mark.parametrize("way", WAYS)
def test_whatever_bits_pages_have_they_come(new_pair: Callable[..., Pair], way: Way) -> None:
    """What does not shrink comes as it is, beside what does: the same as without any codec.

    XLA has one NaN on CPUs, so what is in the pool is not always what leaves it.
    """
    plain, pair = new_pair(way, "raw", "raw"), new_pair(way)
    pair.fill(realistic(1))
    pair.move(8)
    values = int(np.prod(SHAPE))
    every = np.resize(np.arange(65536).astype(np.uint16), (70, values))
    pages = np.moveaxis(every.reshape(70, *SHAPE), 0, 1).copy()
    pages[:, 3:20] = realistic(2)[:, 3:20]
    pages[:, 30] = 0x7FC0
    pages[:, 31] = np.random.default_rng(0).integers(0, 65536, pages[:, 31].shape)
    for one in (plain, pair):
        one.serve()
        one.fill(pages)
        one.move(70)
    numbers = (pages & 0x7F80) != 0x7F80
    np.testing.assert_array_equal(pair.bits()[:, :70][numbers], pages[numbers])
    np.testing.assert_array_equal(pair.bits(), plain.bits())
    assert pair.reader.traffic.refused.total() == 0
    if way == "http":
        assert pair.bytes_of("planes")[1] < 78 * (PAGE_BYTES + HEAD.size) + 4096


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("sends", "reads"),
    [("raw", "planes"), ("planes", "raw"), ("planes", "top16"), ("top16", "planes")],
)
def test_who_cannot_decode_it_gets_pages_as_they_are(
    new_pair: Callable[..., Pair],
    caplog: pytest.LogCaptureFixture,
    way: Way,
    sends: str,
    reads: str,
) -> None:
    pair = new_pair(way, sends, reads)
    bits = realistic(1)
    pair.fill(bits)
    for _ in range(2):
        pair.move(5)
    np.testing.assert_array_equal(pair.bits()[:, :5], bits[:, :5])
    assert pair.bytes_of("raw") == (10 * PAGE_BYTES, (10 if way == "http" else 32) * PAGE_BYTES)
    assert pair.bytes_of("planes") == pair.bytes_of("top16") == (0, 0)
    named = f"{pair.server.url} sends pages as they are, though cluster.codec is {reads} here"
    assert (named in caplog.text) == (reads != "raw")


@pytest.mark.parametrize("way", WAYS)
def test_a_sender_that_was_started_again_has_another_codebook(
    new_pair: Callable[..., Pair], way: Way
) -> None:
    pair = new_pair(way)
    bits = realistic(1)
    pair.fill(bits)
    pair.move(5)
    before = pair._coder.coding
    pair._coder = PageCoder("planes", SHAPE, "bfloat16")
    pair._coder.learn(realistic(9, 8) ^ np.uint16(0x0800), 8)
    pair.serve()
    for _ in range(2):
        pair.move(5)
    after = pair._coder.coding
    assert before is not None
    assert after is not None
    assert before.book != after.book
    np.testing.assert_array_equal(pair.bits()[:, :5], bits[:, :5])
    assert pair.reader.traffic.refused.total() == 0
    assert pair.bytes_of("planes")[0] == 15 * PAGE_BYTES


def test_auto_begins_with_pages_as_they_are_and_codes_where_the_link_is_slow(
    new_pair: Callable[..., Pair],
) -> None:
    pair = new_pair("http", "auto", "auto")
    pair.fill(realistic(1))
    for count in (2, 9):
        pair.move(count)
    links = pair.reader._reader._links
    assert pair.server.coder is not None
    pair.server.coder.settle()
    pair.move(2)
    coding = pair.server.coder.coding
    assert coding is not None
    assert coding.codec == "planes"
    assert coding.ratio > 1.3
    for _ in range(2):
        links.measured(pair.server.url, 10**9, 1e4, coded=False)
    pair.move(9)
    assert pair.bytes_of("planes")[0] == 9 * PAGE_BYTES
    assert pair.bytes_of("planes")[1] < 9 * PAGE_BYTES


def test_pages_that_do_not_compress_are_not_coded_unless_that_is_asked_for() -> None:
    pages = np.random.default_rng(0).integers(0, 65536, (SHAPE[0], 8, *SHAPE[1:]), np.uint16)
    for codec, coded in (("auto", False), ("planes", True)):
        coder = PageCoder(codec, SHAPE, "bfloat16")  # type: ignore[arg-type]
        coder.learn(pages, 8)
        assert not coder.learns
        coder.settle()
        assert (coder.coding is not None) is coded


def test_half_filled_ends_are_no_examples() -> None:
    coder = PageCoder("auto", SHAPE, "bfloat16")
    for _ in range(3):
        coder.learn(realistic(1, 2), 2)
        assert coder.learns
    coder.learn(realistic(1, 1), 1)
    assert coder.learns
    coder.learn(realistic(1, 2), 2)
    coder.settle()
    assert coder.coding is not None


def test_a_codec_that_is_not_for_such_pages_is_a_wrong_configuration() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.codec: planes is for bfloat16 pages"):
        PageCoder("planes", SHAPE, "float32")
    assert not PageCoder("auto", SHAPE, "float32").learns


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
        monkeypatch.setattr(reader._links, "wanted", lambda *args: Wanted(["planes"], False))
        self.refused(pair, "codec", "it comes as planes, unasked")
        monkeypatch.setattr(reader._links, "wanted", lambda *args: None)
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
        serving: Server,
        change: Callable[[Claimed], dict[str, Any]],
        reason: str,
        error: str,
    ) -> None:
        pair = new_pair("jax-transfer")
        pair.fill(realistic(1))
        pair.move(4)
        assert pair.bytes_of("planes")[0] == 4 * PAGE_BYTES
        serving.claimed = lambda claimed: msgspec.structs.replace(claimed, **change(claimed))
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


def test_devices_code_the_same_rows(
    programs: list[Programs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled beforehand, whatever the codebook will be."""
    staging = programs[0].staging
    host, device = Records(SHAPE, staging), Records(SHAPE, staging, "planes")
    programs_of_device: Any = (device._encode, device._decode)
    device.warm_up(sends=True, receives=True)
    coder = PageCoder("planes", SHAPE, "bfloat16")
    coder.learn(realistic(0, 8), 8)
    assert coder.codec is not None
    book = coder.codec.book
    assert book is not None
    piece = jax.device_put(realistic(3, 4).view(jnp.bfloat16), staging)
    compiled = [program._cache_size() for program in programs_of_device]
    for records in (host, device):
        found = records.encode(coder.codec, piece, 3)
        assert found is not None
        rows, lengths = found
        assert len(lengths) == 3
        for other in (host, device):
            back = np.asarray(other.decode(book, rows, lengths)).view(np.uint16)
            np.testing.assert_array_equal(back[:, :3], np.asarray(piece).view(np.uint16)[:, :3])
    assert [program._cache_size() for program in programs_of_device] == compiled
    wild = np.full((SHAPE[0], 4, *SHAPE[1:]), 0x7FC0, np.uint16).view(jnp.bfloat16)
    for records in (host, device):
        assert records.encode(coder.codec, jax.device_put(wild, staging), 4) is None, "no room"
    assert pulling.records_of(LAYOUT, staging, "auto") is not None
