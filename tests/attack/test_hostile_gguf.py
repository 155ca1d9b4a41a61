"""GGUF files that were made to hang, exhaust or crash whoever reads them."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
import pytest

from pshare_jax.convert.__main__ import main
from pshare_jax.convert.sources import open_source
from pshare_jax.errors import CheckpointError
from tests.attack.bounds import SEEDS, cheap
from tests.convert.helpers import gguf_config, random_weights, write_gguf

CONFIG = gguf_config()
WEIGHTS = random_weights(CONFIG)
U8, U32, F32, STRING, ARRAY = 0, 4, 6, 8, 9
GGML_F32, GGML_Q8_0 = 0, 8
HUGE = (1 << 40, 1 << 63, (1 << 64) - 1)


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def entry(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def header(
    entries: list[bytes], tensors: list[bytes], entry_count=None, tensor_count=None
) -> bytes:
    """A GGUF header; the counts are true unless they are given."""
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(entries) if entry_count is None else entry_count,
    )
    return b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join(entries + tensors)


def tensor(name: str, dims: list[int], kind: int = GGML_F32, offset: int = 0) -> bytes:
    shape = struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


ARCHITECTURE = entry("general.architecture", STRING, text("llama"))


def refused(path: Path, *words: str) -> None:
    with cheap(), pytest.raises(CheckpointError) as raised:
        open_source(path)
    message = str(raised.value)
    for word in words:
        assert word in message
    assert "\n" not in message
    assert len(message) <= 2100


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("count", HUGE)
@pytest.mark.parametrize("kind", [U8, F32, STRING, ARRAY])
def test_an_array_longer_than_the_file(tmp_path, kind, count):
    array = struct.pack("<IQ", kind, count)
    refused(
        write(tmp_path, header([ARCHITECTURE, entry("x", ARRAY, array)], []) + bytes(10_000)),
        "metadata x",
    )


def test_an_array_of_every_byte_that_is_there(tmp_path):
    """The length is true: eight million elements of one byte each would be Python objects."""
    count = 1 << 23
    array = struct.pack("<IQ", U8, count) + bytes(count)
    refused(write(tmp_path, header([entry("x", ARRAY, array)], [])), "array elements in all")


@pytest.mark.parametrize("count", HUGE)
def test_more_entries_than_the_file_has_bytes(tmp_path, count):
    content = header([ARCHITECTURE], [], entry_count=count)
    refused(write(tmp_path, content), "the metadata counts")
    content = header([ARCHITECTURE], [], tensor_count=count)
    refused(write(tmp_path, content), "the table of tensors counts")


@pytest.mark.parametrize("count", HUGE)
def test_a_string_longer_than_the_file(tmp_path, count):
    content = header([struct.pack("<Q", count) + b"abc"], [], entry_count=1)
    refused(write(tmp_path, content + bytes(100)), "a metadata key counts")


def test_arrays_within_arrays(tmp_path):
    nested = struct.pack("<IQ", ARRAY, 1) * 5000
    refused(write(tmp_path, header([entry("x", ARRAY, nested)], [])), "array of arrays")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([tensor("t", [1 << 60, 1 << 60])], "tensor t: truncated"),
        ([tensor("t", [32, 1], offset=1 << 63)], "tensor t: truncated"),
        ([tensor("t", [0, 1])], "not in whole blocks"),
        ([tensor("t", [33], kind=GGML_Q8_0)], "not in whole blocks"),
        ([tensor("t", [32] * 9)], "has 9 dimensions"),
        ([tensor("t", [32])] * 2, "tensor t is there twice"),
        ([tensor("t", [32], kind=99)], "knows no type of quantisation with number 99; upgrade"),
    ],
)
def test_a_tensor_that_cannot_be(tmp_path, tensors, words):
    refused(write(tmp_path, header([ARCHITECTURE], tensors) + bytes(500)), words)


@pytest.mark.parametrize("alignment", [0, 3, 1 << 31])
def test_an_alignment_that_is_no_power_of_two(tmp_path, alignment):
    entries = [ARCHITECTURE, entry("general.alignment", U32, struct.pack("<I", alignment))]
    content = header(entries, [tensor("t", [32])]) + bytes(500)
    refused(write(tmp_path, content), "general.alignment")


def edited(tmp_path: Path, **numbers: int) -> Path:
    """A whole model whose metadata has other numbers."""

    def edit(writer):
        for name, number in numbers.items():
            key = f"llama.{name.replace('__', '.')}"
            writer.kv_data[0].pop(key, None)
            writer.add_uint32(key, number)

    write_gguf(tmp_path / "m.gguf", CONFIG, WEIGHTS, edit=edit)
    return tmp_path / "m.gguf"


@pytest.mark.parametrize("number", [10_000_000, (1 << 32) - 1, 4096, 0])
def test_more_layers_than_tensors(tmp_path, number):
    refused(edited(tmp_path, block_count=number), str(number))


@pytest.mark.parametrize("number", [0, 3, (1 << 32) - 1])
@pytest.mark.parametrize(
    "name",
    [
        "attention__head_count",
        "attention__head_count_kv",
        "attention__key_length",
        "embedding_length",
        "feed_forward_length",
    ],
)
def test_sizes_that_do_not_fit_the_tensors(tmp_path, name, number):
    refused(edited(tmp_path, **{name: number}))


def test_a_head_that_is_as_large_as_memory(tmp_path):
    """The factors of Llama 3's rope are computed for the size of a head."""

    def edit(writer):
        for key in ("key_length", "value_length"):
            writer.kv_data[0].pop(f"llama.attention.{key}")
            writer.add_uint32(f"llama.attention.{key}", 1 << 31)
        writer.kv_data[0].pop("llama.rope.dimension_count")
        writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))

    write_gguf(tmp_path / "m.gguf", CONFIG, WEIGHTS, edit=edit)
    refused(tmp_path / "m.gguf", "rope_freqs.weight", "1073741824 components of a head rotate")


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_a_token_of_a_megabyte(tmp_path, model):
    def edit(writer):
        tokens = writer.kv_data[0].pop("tokenizer.ggml.tokens").value
        writer.add_token_list([*tokens[:-1], "ab" * 500_000])
        writer.kv_data[0].pop("tokenizer.ggml.model")
        writer.add_tokenizer_model(model)
        writer.add_token_scores([0.0] * len(tokens))

    write_gguf(tmp_path / "m.gguf", CONFIG, WEIGHTS, edit=edit)
    refused(tmp_path / "m.gguf", "tokenizer.ggml.tokens", "1000000 characters")


def test_names_reach_the_terminal_without_escape_codes(tmp_path, capsys):
    name = "\x1b]0;owned\x07\x1b[31m\x9bx\u202e"
    write_gguf(
        tmp_path / "m.gguf",
        CONFIG,
        WEIGHTS,
        edit=lambda writer: writer.add_tensor(name, np.zeros(4, np.float32)),
    )
    assert main(["import", str(tmp_path / "m.gguf"), str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert r"tensor \x1b]0;owned\x07\x1b[31m\x9bx\u202e is unexpected" in shown
    assert shown.rstrip("\n").isprintable()


def test_a_name_of_a_megabyte_is_shown_in_part(tmp_path):
    content = header([ARCHITECTURE], [tensor("n" * 1_000_000, [32], kind=99)]) + bytes(500)
    refused(write(tmp_path, content), "[...]", "number 99")


@pytest.mark.parametrize("seed", SEEDS)
def test_headers_with_random_damage(tmp_path, seed):
    """Each is refused in a line, or is a model all the same."""
    write_gguf(tmp_path / "whole.gguf", CONFIG, WEIGHTS)
    whole = (tmp_path / "whole.gguf").read_bytes()
    size = len(whole) - sum(array.nbytes for array in WEIGHTS.values())
    rng = random.Random(seed)
    path = tmp_path / "m.gguf"
    messages = []
    for _ in range(50):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 3, 30))):
            at = rng.randrange(4, size)
            width = rng.choice((1, 4, 8))
            content[at : at + width] = rng.choice(
                (rng.randbytes(width), b"\xff" * width, bytes(width), b"\x1b" * width)
            )
        path.write_bytes(content)
        try:
            open_source(path)
        except CheckpointError as error:
            messages.append(str(error))
    assert all(message.isprintable() for message in messages)
    assert len(messages) > 10
