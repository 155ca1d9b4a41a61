"""Pages on their way, in pieces that the compiled programs take; what all connectors share."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from pshare_jax.core.buckets import TRANSFER_BUCKETS, pieces
from pshare_jax.core.connector import TransferError
from pshare_jax.core.messages import PageDescriptor
from pshare_jax.core.plans import Pull
from pshare_jax.runtime.layout import PageLayout
from pshare_jax.runtime.pool import PagePool, Pages
from pshare_jax.runtime.programs import Programs


def page_descriptor(layout: PageLayout) -> PageDescriptor:
    """What every page of a layout looks like, but for its key and contents."""
    return PageDescriptor(
        key=b"",
        layers=(0, layout.num_layers),
        shape=layout.layer_shape(1)[1:],
        dtype=np.dtype(layout.dtype).name,
    )


def describe(layout: PageLayout, keys: list[bytes], checksums: list[int]) -> list[PageDescriptor]:
    """Descriptors of pages of a pool."""
    one = page_descriptor(layout)
    return [
        PageDescriptor(key, one.layers, one.shape, one.dtype, one.codec, checksum)
        for key, checksum in zip(keys, checksums, strict=True)
    ]


def gather_pieces(
    programs: Programs, pool: PagePool, pages: list[int]
) -> tuple[list[jax.Array], list[int]]:
    """Copies pages out of a pool.

    Returns:
        Pieces `[L, bucket, 2, kv_heads, page_size, head_dim]`, and the checksum of each page.
    """
    staged: list[jax.Array] = []
    sums: list[tuple[int, jax.Array]] = []
    start = 0
    for length, bucket in pieces(len(pages), TRANSFER_BUCKETS):
        indices = padded(pages[start : start + length], bucket)
        piece = pool.read(lambda arrays, indices=indices: programs.gather(arrays, indices))
        staged.append(piece)
        sums.append((length, programs.checksum(piece)))
        start += length
    return staged, [int(v) for length, array in sums for v in np.asarray(array)[:length]]


def scatter_pieces(
    programs: Programs, pool: PagePool, staged: Sequence[jax.Array], targets: list[int]
) -> None:
    """Writes pieces, as `gather_pieces` gives them, into pages of a pool."""
    start = 0
    for piece in staged:
        bucket = piece.shape[1]
        indices = padded(targets[start : start + bucket], bucket)
        start += bucket

        def scatter(
            pages: Pages, piece: jax.Array = piece, indices: np.ndarray = indices
        ) -> tuple[Pages, None]:
            return programs.scatter(pages, piece, indices), None

        pool.update(scatter)


def check_contents(pull: Pull, checksums: Sequence[jax.Array]) -> None:
    """Checks that what has come is what was offered; waits for it.

    Args:
        pull: with the checksums that were offered.
        checksums: of the pages of each piece that has come; only the last one is padded.

    Raises:
        TransferError: names the first page that is different.
    """
    sums = [int(s) for piece in checksums for s in np.asarray(piece)]
    for number, (found, said) in enumerate(zip(sums, pull.descriptors, strict=False)):
        if found != said.checksum:
            raise TransferError(
                f"transfer {pull.transfer}, page {number}: its checksum is {found:08x}, but "
                f"{said.checksum:08x} was offered"
            )


def padded(pages: list[int], bucket: int) -> np.ndarray:
    """int32 page numbers, padded with the padding page 0 to length `bucket`."""
    indices = np.zeros(bucket, np.int32)
    indices[: len(pages)] = pages
    return indices
