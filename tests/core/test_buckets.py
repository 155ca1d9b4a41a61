from __future__ import annotations

import pytest

from pshare_jax.core.buckets import TRANSFER_BUCKETS, bucket_for, pieces


def test_bucket_for() -> None:
    assert [bucket_for(n, [8, 1, 32]) for n in (0, 1, 2, 8, 9, 32)] == [1, 1, 8, 8, 32, 32]
    with pytest.raises(ValueError, match="33"):
        bucket_for(33, [8, 1, 32])


@pytest.mark.parametrize("size", [0, 1, 3, 4, 16, 17, 63, 64, 65, 128, 300])
def test_pieces_cover_everything_once(size: int) -> None:
    cut = pieces(size, TRANSFER_BUCKETS)
    assert sum(length for length, _ in cut) == size
    assert all(0 < length <= bucket and bucket in TRANSFER_BUCKETS for length, bucket in cut)
    # Padding only at the end.
    assert all(length == bucket for length, bucket in cut[:-1])
