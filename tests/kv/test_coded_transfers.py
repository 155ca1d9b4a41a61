"""Coded pages between processes: bit for bit what was offered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.errors import ConfigError
from pshare_jax.kv import pulling
from pshare_jax.kv.coding import (
    PageCoder,
)
from pshare_jax.kv.reading import HEAD
from pshare_jax.kv.records import Records
from pshare_jax.kv.ways import Way
from pshare_jax.runtime.programs import Programs
from tests.kv.coded import LAYOUT, PAGE_BYTES, SHAPE, WAYS, Pair, realistic


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
    links = pair.reader._reader.coded.links
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


def test_devices_code_the_same_rows(coded_programs: list[Programs]) -> None:
    """Compiled beforehand, whatever the codebook will be."""
    staging = coded_programs[0].staging
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
