"""Bytes that shared prefixes save, and bytes counted from a compiled program's text."""

from dataclasses import asdict

import pytest

from pshare_jax.bench import shared_prefix
from pshare_jax.bench.compile_models import MODELS
from pshare_jax.bench.hbm_traffic import hbm_bytes
from pshare_jax.bench.shared_prefix import SharedPrefixOptions, page_bytes

TOKEN = 2 * 32 * 8 * 128 * 2
"""KV bytes of a token of Llama-3.1-8B in bfloat16."""


def test_the_shared_prompt_is_read_once():
    rows = list(page_bytes(SharedPrefixOptions(), MODELS["Llama-3.1-8B"]))
    assert {row.context for row in rows} == {2048, 8192}
    for row in rows:
        assert row.plain_bytes == row.sharers * (row.context + 256) * TOKEN
        assert row.shared_bytes == (row.context + row.sharers * 256) * TOKEN


def result():
    options = SharedPrefixOptions(contexts=[2048])
    rows = [asdict(row) for row in page_bytes(options, MODELS[options.model])]
    return {"model": "M", "own": 256, "rows": rows, "besides": {"v5e:2x4": [[1e6, 2.4e6]] * 5}}


def test_table_and_plot(tmp_path):
    lines = shared_prefix.markdown(result())
    assert "| 2,048 | 1 | 0.30 GB | 0.30 GB | 0 % | - |" in lines
    assert "| 2,048 | 4 | 1.21 GB | 0.40 GB | 67 % | 1 MB / 2 MB |" in lines
    shared_prefix.draw(result(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # On-chip operands and results are free; a prefetch reads its size once.
        ("%f = f32[256]{0:T(128)} fusion(%w, %on), kind=kLoop", 1024 * 4 + 256 * 4),
        ("%s = ((f32[1024]{0}), f32[64]{0:S(1)}, s32[]{:S(2)}) slice-start(%w)", 64 * 4),
        ("%c = (f32[1024]{0:S(1)}, f32[1024]{0}, u32[]{:S(2)}) copy-start(%w)", 1024 * 4),
        ("%gather_fusion = f32[8]{0:S(1)} fusion(%w, %on), kind=kLoop", 8 * 4),
        ("%b = f32[1024]{0} bitcast(%w)", 0),
        ('%b = f32[1024]{0} custom-call(%w), custom_call_target="ConcatBitcast"', 0),
        ('%k = f32[2048]{0} custom-call(%pool, %w), custom_call_target="tpu"', 1024 * 4),
        ("%d = f32[16]{0} conditional(%p, %w)", 16 * 4),
    ],
)
def test_bytes_of_an_instruction(line, expected):
    text = f"""HloModule m

ENTRY %main (w: f32[1024], pool: f32[2048]) -> f32[1] {{
  %w = f32[1024]{{0}} parameter(0)
  %pool = f32[2048]{{0}} parameter(1)
  %on = f32[512]{{0:S(1)}} constant(0)
  %p = pred[]{{:S(6)}} constant(0)
  ROOT {line}
}}
"""
    assert hbm_bytes(text, layer_bytes=8192) == expected
