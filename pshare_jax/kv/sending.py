"""What a process sends of a transfer that is on offer: its file as it is, or coded page by page."""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Awaitable, Callable, Iterator

import numpy as np
import xxhash

from pshare_jax.core.buckets import TRANSFER_BUCKETS, pieces
from pshare_jax.kv.coding import Coding, PageCoder
from pshare_jax.kv.reading import HEAD

_CHUNK = 1024 * 1024


def plain_frames(descriptor: int) -> Iterator[bytes]:
    """The bytes of an offer's file, in order."""
    at = 0
    while chunk := os.pread(descriptor, _CHUNK, at):
        yield chunk
        at += len(chunk)


def coded_frames(descriptor: int, coder: PageCoder, coding: Coding) -> Iterator[memoryview | bytes]:
    """The frames of an offer's file, see `kv.reading`: each is coded when it is asked for.

    Args:
        descriptor: of the file.
        coder: codes its pages.
        coding: what the reader was told.
    """
    assert coder.codec is not None
    assert coder.codec.book is not None
    if coding.table:
        yield coder.codec.book.table.tobytes()
    for staged, length in _pieces(descriptor, coder):
        for index in range(length):
            frame = coder.record(staged, index, HEAD.size)
            record = frame[HEAD.size :]
            HEAD.pack_into(frame, 0, len(record), xxhash.xxh3_64_intdigest(record))
            yield frame


async def send(
    frames: Iterator[bytes | memoryview], write: Callable[[bytes | memoryview], Awaitable[None]]
) -> None:
    """Writes frames, each of which is made by a thread while the one before is written."""
    made = asyncio.create_task(asyncio.to_thread(next, frames, None))
    try:
        while (frame := await asyncio.shield(made)) is not None:
            made = asyncio.create_task(asyncio.to_thread(next, frames, None))
            await write(frame)
    finally:
        # Also when nobody wants it any more: it reads a file that is about to be closed.
        await asyncio.wait([made])


def learn(descriptor: int, coder: PageCoder) -> None:
    """Has a coder see the pages of an offer's file."""
    for staged, length in _pieces(descriptor, coder):
        coder.learn(staged, length)


def _pieces(descriptor: int, coder: PageCoder) -> Iterator[tuple[np.ndarray, int]]:
    """The pieces of a file of pages, each `[L, n, 2, kv_heads, page_size, head_dim]`, and n."""
    size, page_bytes = os.fstat(descriptor).st_size, coder.page_bytes
    if not size:
        return
    # Nobody else can cut it short: it has been taken, and is this process's own.
    values = np.frombuffer(mmap.mmap(descriptor, size, prot=mmap.PROT_READ), np.uint16)
    (layers, *shape), at = coder.shape, 0
    for length, _ in pieces(size // page_bytes, TRANSFER_BUCKETS):
        count = length * page_bytes // 2
        yield values[at : at + count].reshape(layers, length, *shape), length
        at += count
