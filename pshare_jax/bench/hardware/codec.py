"""Lossless compression of KV pages, by a thread of the host and on the device."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pshare_jax.bench.hardware.device import seconds
from pshare_jax.bench.hardware.kernels import Keep
from pshare_jax.bench.hardware.scale import Scale
from pshare_jax.kernels.kv_codec import xla
from pshare_jax.kernels.kv_codec.api import page_codec
from pshare_jax.kernels.kv_codec.codebook import Codebook, calibrate

CODECS = ("planes", "top16")
ROOM = 1.1
"""Bytes that a device's records have room for, over those of a record without escapes."""


def run(scale: Scale, keep: Keep) -> None:
    """Keeps for each codec `{"ratio", "host": {...}, "device": {...}}`, the GB/s of pages that are
    encoded and decoded (`encode`, `decode`), or `error`.

    The pages are made up: values whose size goes by their channel, as those of KV do; the ratio of
    a model's own KV is that of `bench codec`.
    """
    model = scale.large
    shape = (model.num_layers, 2, model.num_kv_heads, scale.page_size, model.head_dim)
    bits = made_up(shape, scale.codec_pages)
    # First what cannot fail to compile.
    found: dict[str, dict[str, Any]] = {}
    for name in CODECS:
        host = _host(scale, calibrate(name, bits), bits)
        found[name] = {"ratio": host.pop("ratio"), "host": host, "device": {"error": "not begun"}}
        keep(name, found[name])
    for name in CODECS:
        found[name]["device"] = _device(scale, calibrate(name, bits), bits)
        keep(name, found[name])


def made_up(shape: tuple[int, ...], count: int) -> np.ndarray:
    """Bits of pages `[count, *shape]`, uint16: normal values, scaled by channel."""
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(0, 1.5, (*shape[:3], 1, shape[4])).astype(np.float32)
    pages = [rng.standard_normal(shape, np.float32) * sizes for _ in range(count)]
    return np.stack(pages).astype(ml_dtypes.bfloat16).view(np.uint16)


def _host(scale: Scale, book: Codebook, bits: np.ndarray) -> dict[str, Any]:
    staged = np.ascontiguousarray(np.moveaxis(bits, 0, 1))
    codec, out = page_codec(book), np.zeros(2 * bits[0].nbytes, np.uint8)
    records = []
    for index in range(len(bits)):
        length = codec.encode(staged, index, out)
        assert length is not None, "a record is never twice as large as its page"
        records.append(out[:length].copy())
    back = np.empty_like(staged)

    def encode() -> None:
        for index in range(len(bits)):
            codec.encode(staged, index, out)

    def decode() -> None:
        for index, record in enumerate(records):
            codec.decode(record, back, index)

    rates = {
        name: bits.nbytes / seconds(call, scale.repeats, scale.least_seconds) / 1e9
        for name, call in (("encode", encode), ("decode", decode))
    }
    if not np.array_equal(back, staged):
        raise AssertionError(f"{book.codec}: pages are not what they were before")
    return {"backend": codec.backend, "ratio": bits.nbytes / sum(map(len, records)), **rates}


def _device(scale: Scale, book: Codebook, bits: np.ndarray) -> dict[str, Any]:
    if jax.default_backend() == "tpu":
        return {"error": "not measured: its compiler takes minutes for the scatter of escapes"}
    shape = bits.shape[1:]
    capacity = int(ROOM * book.fixed_bytes(math.prod(shape)))
    pages = jnp.asarray(bits.view(ml_dtypes.bfloat16))
    try:
        encode = jax.jit(lambda x: xla.encode(book, x, capacity))
        records, lengths = encode(pages)
        if int(lengths.max()) > capacity:
            return {"error": f"records of {int(lengths.max())} bytes, room for {capacity}"}
        decode = jax.jit(lambda r: xla.decode(book, r, shape))
        if not np.array_equal(np.asarray(decode(records)).view(np.uint16), bits):
            return {"error": "pages are not what they were before"}
        calls = {"encode": lambda: encode(pages), "decode": lambda: decode(records)}
        return {
            name: bits.nbytes / seconds(call, scale.repeats, scale.least_seconds) / 1e9
            for name, call in calls.items()
        }
    except Exception as error:  # the host's rates count all the same
        return {"error": " ".join(str(error).split())[:300]}
