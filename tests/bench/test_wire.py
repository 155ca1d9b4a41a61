"""The benchmark of pages over slow links: it measures what it says, and nothing else decides."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pshare_jax.bench import wire
from pshare_jax.bench.wire import WireOptions, _measure
from pshare_jax.kv import direct
from pshare_jax.runtime.layout import PageLayout
from tests.kernels.test_kv_codec import realistic

SHAPE = (2, 2, 2, 8, 16)


@pytest.mark.parametrize("link", [0.0, wire.DIRECT])
def test_pages_come_from_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: float | str
) -> None:
    # The machine may be busy.
    monkeypatch.setattr(direct, "PULL_SECONDS", 60.0)
    staged = np.ascontiguousarray(np.moveaxis(realistic(SHAPE, 0, 5), 0, 1))
    np.save(tmp_path / "pages.npy", staged)
    layout = PageLayout(2, 2, 16, 8, ml_dtypes.bfloat16)
    options = WireOptions(pages=5, rounds=2)
    plain, coded = _measure(
        options, layout, staged, tmp_path / "pages.npy", link, ("raw", "planes")
    )
    assert [(row["link"], row["codec"]) for row in (plain, coded)] == [
        (link, "raw"),
        (link, "planes"),
    ]
    assert min(plain["gb_s"], coded["gb_s"]) > 0
    assert (plain["coded"], coded["coded"]) == (0.0, 1.0)


def test_a_table_of_links_and_settings() -> None:
    rows = [
        {"link": link, "codec": codec, "gb_s": 1.234, "wire_share": 0.7, "coded": 1.0}
        for link in (0.1, 0.0, wire.DIRECT)
        for codec in wire.SETTINGS
    ]
    shown = wire.lines({"options": {"pages": 16}, "page_bytes": 1000, "rows": rows})
    assert shown[2] == "| link, GB/s | raw | planes | top16 | auto |"
    assert shown[4] == f"| 0.1 |{' 1.23 (0.70) |' * 4}"
    assert [line.split("|")[1].strip() for line in shown[5:]] == ["loopback", "jax-transfer"]
