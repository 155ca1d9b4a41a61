"""The codec in C++ without AVX-512, as it is compiled on other processors: the same bytes."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pshare_jax.kernels.kv_codec import reference
from pshare_jax.kernels.kv_codec.codebook import calibrate
from pshare_jax.kernels.native import library
from tests.kernels.test_kv_codec import SHAPES, adversarial, realistic

SOURCE = """
#include "kv_codec.h"
using namespace pshare;
extern "C" long encode(int planes, const uint16_t* x, long layers, long values, long block,
                       long channels, const uint8_t* book, uint8_t* out, long capacity) {
  CodedPage page{layers, values, values, block, channels, book};
  return planes == 3 ? encode_page<3>(x, page, out, capacity)
                     : encode_page<4>(x, page, out, capacity);
}
extern "C" int decode(int planes, const uint8_t* in, long length, long layers, long values,
                      long block, long channels, const uint8_t* book, uint16_t* x) {
  CodedPage page{layers, values, values, block, channels, book};
  return planes == 3 ? decode_page<3>(in, length, page, x) : decode_page<4>(in, length, page, x);
}
"""
X86 = {"AVX2": "-march=x86-64-v3", "SSE2": "-march=x86-64"}
SETS = X86 if platform.machine() == "x86_64" else {"default": "-O3"}


@pytest.fixture(scope="module", params=SETS.values(), ids=SETS)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("codec")
    (folder / "codec.cc").write_text(SOURCE)
    made = folder / "codec.so"
    command = [library._compiler(), "-O3", "-std=c++17", "-fPIC", "-shared", request.param]
    command += [f"-I{library.SOURCES}", str(folder / "codec.cc"), "-o", str(made)]
    subprocess.run(command, check=True, timeout=300)
    loaded = ctypes.CDLL(str(made))
    loaded.encode.restype = ctypes.c_long
    long, pointer = ctypes.c_long, ctypes.c_void_p
    loaded.encode.argtypes = [ctypes.c_int, pointer, *[long] * 4, pointer, pointer, long]
    loaded.decode.argtypes = [ctypes.c_int, pointer, long, *[long] * 4, pointer, pointer]
    return loaded


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("codec", ["planes", "top16"])
def test_the_same_bytes_and_bits(compiled, codec, shape):
    book = calibrate(codec, realistic(shape, 0))
    values = int(np.prod(shape[1:]))
    geometry = shape[0], values, shape[-2] * shape[-1], shape[-1]
    pages = {"realistic": realistic(shape, 1, 1)[0].reshape(-1), **adversarial(shape, book)}
    for name, bits in pages.items():
        page = np.ascontiguousarray(bits.reshape(shape))
        record = reference.encode(book, page)
        out = np.zeros(3 * page.nbytes, np.uint8)
        table, size = book.table.ctypes.data, out.nbytes
        length = compiled.encode(
            book.planes, page.ctypes.data, *geometry, table, out.ctypes.data, size
        )
        assert length == len(record), name
        assert np.array_equal(out[:length], record), name
        back = np.zeros_like(page)
        source, target = out.ctypes.data, back.ctypes.data
        assert compiled.decode(book.planes, source, length, *geometry, table, target)
        assert np.array_equal(back, page), name
        assert not compiled.decode(book.planes, source, length - 1, *geometry, table, target)
