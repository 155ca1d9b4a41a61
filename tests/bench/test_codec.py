"""bench codec: what it computes of what it has measured."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pshare_jax.bench import codec
from pshare_jax.bench.codec import CodecOptions
from pshare_jax.errors import ConfigError
from tests.kernels.test_kv_codec import realistic

SHAPE = (2, 2, 3, 32, 64)


def test_a_codec_pays_below_the_rate_where_coding_takes_what_it_saves():
    ratio, encode, decode = 1.43, 9.5e9, 11.8e9
    even = (1 - 1 / ratio) / (1 / encode + 1 / decode)
    assert codec._serial(even, ratio, encode, decode) == pytest.approx(1.0)
    assert codec._serial(even / 10, ratio, encode, decode) > 1.3
    assert codec._serial(even * 10, ratio, encode, decode) < 0.5


def test_in_pieces_the_slowest_counts():
    assert codec._pipelined(1e9, 1.4, 9e9, 9e9) == pytest.approx(1.4)
    assert codec._pipelined(10e9, 1.4, 9e9, 12e9) == pytest.approx(0.9)


def test_figures_of_known_pages():
    pages = {name: realistic(SHAPE, seed, 4) for seed, name in enumerate(["code", "chat"], 1)}
    test = np.ascontiguousarray(np.moveaxis(np.concatenate(list(pages.values())), 0, 1))
    options = CodecOptions(repeats=1, pool_bytes=2**26)
    found = codec._measure("planes", realistic(SHAPE, 0, 8), pages, test, SHAPE, options)
    assert list(found["ratio"]) == ["code", "chat"]
    assert 1.40 < found["worst"] <= min(found["ratio"].values()) < 16 / 11
    assert 1.3 < found["capacity"] < 16 / 11
    assert found["slots"]["planes"] == round(found["capacity"] * found["slots"]["raw"])
    result = {"page_bytes": 1, "copy_gb_s": 1.0, "codecs": {"planes": found}}
    assert len(codec.lines(result)) == 6
    json.dumps(found)


def test_texts_are_files_and_conversations(tmp_path):
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    assert codec._text(str(chat)) == "<|im_start|>user\nHi<|im_end|>\n"
    with pytest.raises(ConfigError, match="nowhere: No such file"):
        codec._text("nowhere")
