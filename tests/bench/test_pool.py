"""bench pool: what it computes of what it has measured, and a run over a tiny base."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pshare_jax.bench import pool, pool_steady
from pshare_jax.bench.__main__ import main
from pshare_jax.bench.first_token import FirstToken
from pshare_jax.bench.pool import OWN, POOL, SOCKET
from pshare_jax.bench.pool_steady import Times
from pshare_jax.convert.orbax import write_prefill
from pshare_jax.core.prices import DISK, SHARED, Prices
from pshare_jax.engine.kv_store import EngineStore
from pshare_jax.kernels.kv_codec.codebook import calibrate
from pshare_jax.models.decoder import init_weights
from tests.helpers import tiny_config
from tests.kernels.test_kv_codec import realistic
from tests.text.tiny import write_byte_level

FREE = Prices(1.0, 0.0, {SHARED: 0.0, DISK: 0.0}, {SHARED: 0.0, DISK: 0.0})
"""Computing is so dear that whatever the store has is fetched."""


def test_figures_of_first_tokens():
    def token(seconds: float, computed: int) -> FirstToken:
        return FirstToken(seconds, 2 * seconds, computed, (1,))

    found = [(POOL, 128, token(s, 0)) for s in (0.1, 0.2, 0.4)]
    found += [(SOCKET, 128, token(0.5, 0)), (OWN, 128, token(4.0, 127))]
    result = pool.figures(found, page_size=64)
    assert result["first_token"]["128"][POOL] == {
        "seconds": {"median": 0.2, "low": 0.1, "high": 0.4},
        "cpu_seconds": {"median": 0.4, "low": 0.2, "high": 0.8},
        "computed": [0, 0, 0],
    }
    assert result["ratio"] == {"128": {POOL: 1.0, SOCKET: 2.5, OWN: 20.0}}
    assert result["compute_cpu_ms"] == pytest.approx(1e3 * 8.0 / 127 * 64)


def test_rates_are_of_the_median_and_processor_time_of_all():
    times = Times([0.1, 0.4, 0.2], [0.1, 0.2, 0.6])
    assert times.figures(pages=4, page_bytes=10**8) == (pytest.approx(2.0), pytest.approx(75.0))


@pytest.mark.parametrize("codec", ["raw", "planes"])
def test_pages_go_through_a_pool(codec: str, tmp_path: Path):
    pages = realistic((2, 2, 1, 32, 64), 0, 4)
    book = None if codec == "raw" else calibrate("planes", pages)
    staged = np.ascontiguousarray(np.moveaxis(pages, 0, 1))
    way = pool_steady.through_pool(codec, book, staged, tmp_path, rounds=5)
    assert min(vars(way).values()) >= 0
    assert way.write_gb_s > 0
    assert way.read_gb_s > 0


def test_a_second_engine_gets_what_the_first_has_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(EngineStore, "_measure", lambda self, tiers: FREE)
    config = tiny_config(vocab_size=416, max_position_embeddings=512)
    tokenizer = write_byte_level(tmp_path / "tokenizer")
    files = {path.name: path.read_bytes() for path in tokenizer.iterdir()}
    write_prefill(tmp_path / "base", config, init_weights(config, 0), files)
    flags = [f"--base={tmp_path}/base", "--lengths=[24,70]", "--repeats=1", "--page_size=16"]
    flags += ["--dtype=float32", f"--folder={tmp_path}", "--store_bytes=4194304", "--rounds=2"]
    assert main(["pool", *flags, f"--json={tmp_path}/out.json"]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    for length in (24, 70):
        found = result["first_token"][str(length)]
        computed = {way: found[way]["computed"] for way in found}
        assert computed == {POOL: [0], SOCKET: [0], OWN: [length - 1]}
    assert set(result["steady"]) == {"pool, raw", "socket"}
    for way in result["steady"].values():
        assert way["write_gb_s"] > 0
        assert way["read_gb_s"] > 0
    assert result["codec"] == "raw"
    shown = capsys.readouterr().out
    assert "70 tokens, socket: " in shown
    assert "Computing a page takes " in shown
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("pshare-bench")]
