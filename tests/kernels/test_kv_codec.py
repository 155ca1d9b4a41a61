"""The KV codec: bit for bit the same on every backend, whatever the page holds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pshare_jax.kernels.kv_codec import cpu_ffi, reference, xla
from pshare_jax.kernels.kv_codec.api import PageCodec, page_codec
from pshare_jax.kernels.kv_codec.codebook import Codebook, calibrate, supported

CODECS = ("planes", "top16")
SHAPES = {
    "head_dim 64": (2, 2, 3, 8, 64),
    "head_dim 16": (3, 2, 1, 8, 16),
    "head_dim 80": (1, 2, 2, 16, 80),
    "head_dim 128": (2, 2, 1, 4, 128),
    "head_dim 96": (1, 2, 1, 2, 96),
}


def realistic(shape: tuple[int, ...], seed: int, count: int = 4) -> np.ndarray:
    """Bits of values whose sizes go by their channels, as those of KV do."""
    rng = np.random.default_rng(seed)
    sizes = np.random.default_rng(7).lognormal(0, 2, (*shape[:3], 1, shape[4]))
    values = rng.normal(0, 1, (count, *shape)) * sizes
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)


def adversarial(shape: tuple[int, ...], book: Codebook) -> dict[str, np.ndarray]:
    """Pages of which each exponent, none, or every second one has a code; and every bit pattern."""
    count = int(np.prod(shape))
    every = np.resize(np.arange(65536), (65536 // count + 1) * count).astype(np.uint16)
    special = np.array([0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F81, 0, 0x8000, 1, 0x8001, 0x7F], "u2")
    coded = (realistic(shape, 3, 1)[0].reshape(-1)).copy()
    mixed = coded.copy()
    mixed[::2] = 0x7F80
    patterns = {f"patterns {i}": part for i, part in enumerate(every.reshape(-1, count))}
    return patterns | {
        "special values": np.resize(special, count),
        "zeros": np.zeros(count, np.uint16),
        "no exponent has a code": np.full(count, 0x7FC0, np.uint16),
        "every second": mixed,
        "random": np.random.default_rng(5).integers(0, 65536, count).astype(np.uint16),
    }


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("codec", CODECS)
def test_all_backends_write_the_same_bytes_and_give_the_same_bits(codec, shape):
    book = calibrate(codec, realistic(shape, 0))
    pages = {"realistic": realistic(shape, 1, 1)[0].reshape(-1), **adversarial(shape, book)}
    capacity = 2 * int(np.prod(shape)) + book.fixed_bytes(int(np.prod(shape)))
    every = np.stack(list(pages.values())).reshape(-1, *shape)
    encode = jax.jit(lambda x: xla.encode(book, x, capacity))
    records, lengths = encode(jnp.asarray(every.view(ml_dtypes.bfloat16)))
    decoded = jax.jit(lambda r: xla.decode(book, r, shape))(records)
    records, lengths = np.asarray(records), np.asarray(lengths)
    staged = np.ascontiguousarray(np.moveaxis(every, 0, 1))
    back = np.zeros_like(staged)
    for i, name in enumerate(pages):
        record = reference.encode(book, every[i])
        assert np.array_equal(reference.decode(book, record, shape), every[i]), name
        out = np.full(capacity, 0xAA, np.uint8)
        assert cpu_ffi.encode(book, staged, i, out) == len(record), name
        assert np.array_equal(out[: len(record)], record), name
        cpu_ffi.decode(book, record, back, i)
        assert int(lengths[i]) == len(record), name
        assert np.array_equal(records[i][: len(record)], record), name
    assert np.array_equal(back, staged)
    assert np.array_equal(np.asarray(decoded).view(np.uint16), every)


@pytest.mark.parametrize("codec", CODECS)
def test_a_record_that_does_not_fit_is_refused_and_nothing_is_written_past_the_end(codec):
    shape = SHAPES["head_dim 64"]
    book = calibrate(codec, realistic(shape, 0))
    page = realistic(shape, 1, 1)[0]
    record = reference.encode(book, page)
    fixed = book.fixed_bytes(page.size)
    assert len(record) > fixed, "some exponents have no code"
    for capacity in (0, 1, fixed - 1, fixed, len(record) - 1, len(record)):
        memory = np.full(capacity + 64, 0xAA, np.uint8)
        length = cpu_ffi.encode(book, page[:, None], 0, memory[:capacity])
        assert length == (len(record) if capacity >= len(record) else None)
        assert np.all(memory[capacity:] == 0xAA)
        plain = PageCodec(book, "reference")
        assert plain.encode(page[:, None], 0, np.zeros(capacity, np.uint8)) == length


@pytest.mark.parametrize("backend", ["cpu_ffi", "reference"])
@pytest.mark.parametrize("codec", [*CODECS, "raw"])
def test_a_record_of_the_wrong_length_is_refused(codec, backend):
    shape = SHAPES["head_dim 16"]
    page = realistic(shape, 1, 1)[0][:, None]
    book = None if codec == "raw" else calibrate(codec, realistic(shape, 0))
    coder = PageCodec(book, backend)
    out = np.zeros(4 * page.size, np.uint8)
    length = coder.encode(page, 0, out)
    assert length is not None
    for wrong in (0, 10, length - 2, length + 2, 4 * page.size):
        with pytest.raises(ValueError, match=r"record|bytes|have no code"):
            coder.decode(out[:wrong], np.zeros_like(page), 0)
    back = np.zeros_like(page)
    coder.decode(out[:length], back, 0)
    assert np.array_equal(back, page)


def test_random_bytes_are_decoded_or_refused_within_bounds():
    """What the planes say of the length is never believed."""
    shape = SHAPES["head_dim 16"]
    rng = np.random.default_rng(0)
    for codec in CODECS:
        book = calibrate(codec, realistic(shape, 0))
        for _ in range(200):
            record = rng.integers(0, 256, rng.integers(0, 3 * 768)).astype(np.uint8)
            memory = np.zeros((3, 3, *shape[1:]), np.uint16)
            with pytest.raises(ValueError):
                cpu_ffi.decode(book, record, memory, 1)
            assert not memory[:, [0, 2]].any()


def test_raw_holds_pages_of_other_dtypes():
    pages = np.random.default_rng(0).normal(size=(2, 3, 2, 1, 4, 16)).astype(np.float32)
    coder = page_codec(None)
    out, back = np.zeros(pages[:, 1].nbytes, np.uint8), np.zeros_like(pages)
    assert coder.encode(pages, 1, out) == out.nbytes
    assert coder.encode(pages, 1, out[:-1]) is None
    coder.decode(out, back, 2)
    assert np.array_equal(back[:, 2], pages[:, 1])
    assert not back[:, :2].any()


def test_bases_are_those_that_cover_most_exponents():
    shape = (1, 2, 1, 64, 16)
    rng = np.random.default_rng(0)
    first = rng.integers(0, 249, (1, 1, 2, 1, 1, 16))
    exponents = first + rng.integers(0, 7, (8, *shape))
    exponents[0, ..., 0, :] = 255
    book = calibrate("planes", (exponents << 7).astype(np.uint16))
    assert np.array_equal(book.table, first[0, ..., 0, :])


def test_the_table_has_the_most_frequent_exponents():
    exponents = np.repeat(np.arange(100, 120), np.arange(1, 21))
    page = np.resize(exponents, (1, 1, 2, 1, 32, 64))
    book = calibrate("top16", (page << 7).astype(np.uint16))
    assert set(book.table.tolist()) == set(range(105, 120))
    assert book.code_of()[[104, 119]].tolist() == [15, book.table.tolist().index(119)]


def test_pages_compress_as_their_entropy_says():
    """Normal values with a size a channel: 3 planes are nearly all that there is."""
    shape = (4, 2, 3, 32, 64)
    ratio = {}
    for codec in CODECS:
        book = calibrate(codec, realistic(shape, 0, 16))
        page = realistic(shape, 1, 1)[0]
        ratio[codec] = page.nbytes / len(reference.encode(book, page))
    assert ratio["planes"] > 1.42
    assert 1.0 < ratio["top16"] < 1.34


@pytest.mark.parametrize(
    ("shape", "dtype", "can"),
    [
        ((2, 2, 3, 32, 64), "bfloat16", True),
        ((2, 2, 3, 32, 64), "float32", False),
        ((2, 2, 1, 3, 16), "bfloat16", False),
        ((2, 2, 1, 4, 16), "bfloat16", True),
    ],
)
def test_what_can_be_coded(shape, dtype, can):
    assert supported(shape, dtype) is can
