"""Codebooks: what exponents are coded by, and how they are calibrated on a model's own KV."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CODECS = ("raw", "planes", "top16")
"""Numbers of codecs in stored records are places in this tuple: append only."""

GROUP = 64
"""Values whose codes make up one word a plane."""


@dataclass(frozen=True, eq=False)
class Codebook:
    """What the exponents of one model's KV are coded by.

    Args:
        codec: `planes` codes an exponent by its distance, 0 to 6, from a base of its channel;
            `top16` by its place among 15 exponents, which are the same for all channels. In both
            the last code stands for an exponent that follows by itself.
        table: uint8; `[L, 2, kv_heads, head_dim]` bases, or `[15]` exponents.
    """

    codec: str
    table: np.ndarray

    @property
    def planes(self) -> int:
        """Bits of a code."""
        return 3 if self.codec == "planes" else 4

    def fixed_bytes(self, values: int) -> int:
        """Bytes of a record of so many values without the exponents that follow by themselves."""
        return values + self.planes * values // 8

    def bases(self, shape: tuple[int, ...]) -> np.ndarray:
        """Bases of `planes` that broadcast over pages `[L, 2, kv_heads, page_size, head_dim]`."""
        return np.expand_dims(self.table, -2) * np.ones(shape, np.uint8)

    def code_of(self) -> np.ndarray:
        """`[256]` uint8, the code of each exponent by `top16`; 15 where it has none."""
        codes = np.full(256, 15, np.uint8)
        codes[self.table[::-1]] = np.arange(14, -1, -1, dtype=np.uint8)
        return codes


def supported(shape: tuple[int, ...], dtype: str) -> bool:
    """Whether pages `[L, 2, kv_heads, page_size, head_dim]` of a dtype can be coded."""
    return dtype == "bfloat16" and (shape[-2] * shape[-1]) % GROUP == 0


def calibrate(codec: str, pages: np.ndarray) -> Codebook:
    """The codebook that codes most of the exponents of a sample.

    Args:
        codec: `planes` or `top16`.
        pages: `[n, L, 2, kv_heads, page_size, head_dim]` uint16, the bits of bfloat16 KV.

    Raises:
        ValueError: another codec.
    """
    exponents = (pages >> 7 & 0xFF).astype(np.uint8)
    if codec == "top16":
        counts = np.bincount(exponents.reshape(-1), minlength=256)
        return Codebook(codec, np.argsort(-counts, kind="stable")[:15].astype(np.uint8))
    if codec != "planes":
        raise ValueError(f"codec {codec!r} has no codebook; choose planes or top16")
    head_dim = pages.shape[-1]
    by_channel = np.moveaxis(exponents, (0, -2), (-2, -1)).reshape(-1, head_dim, *_sample(pages))
    flat = by_channel.reshape(-1, by_channel.shape[-1])
    bases = np.concatenate([_bases(flat[i : i + 4096]) for i in range(0, len(flat), 4096)])
    return Codebook(codec, bases.reshape(*pages.shape[1:4], head_dim))


def _sample(pages: np.ndarray) -> tuple[int]:
    return (pages.shape[0] * pages.shape[-2],)


def _bases(exponents: np.ndarray) -> np.ndarray:
    """For each row of `[channels, n]` exponents the first of the 7 that cover most of them."""
    offsets = 256 * np.arange(len(exponents))[:, None]
    counts = np.bincount((exponents + offsets).reshape(-1), minlength=256 * len(exponents))
    sums = np.pad(np.cumsum(counts.reshape(-1, 256), axis=1), ((0, 0), (1, 0)))
    covered = sums[:, 7:] - sums[:, :-7]
    # Of equally good ones the middle, so that near exponents of other data are covered, too.
    best = covered == covered.max(axis=1, keepdims=True)
    first, last = best.argmax(axis=1), best.shape[1] - 1 - best[:, ::-1].argmax(axis=1)
    middle = (first + last) // 2
    rows = np.arange(len(middle))
    return np.where(best[rows, middle], middle, first).astype(np.uint8)
