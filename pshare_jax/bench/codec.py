"""`bench codec`: how far KV compresses without loss, how fast, and on which links that pays.

Codebooks are calibrated on one text; ratios are of the KV of others, whole records with all that
is in them. A link of B bytes a second carries a page of n bytes in n / B; compressed by r, coded at
E and decoded at D bytes a second, one after the other, in n / E + n / (r B) + n / D. With pieces
on their way while others are coded, the slowest of the three counts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pshare_jax.config import ModelEntry, ServeConfig
from pshare_jax.convert.manifest import TOKENIZER_FOLDER
from pshare_jax.engine.devices import compute_dtype, prepare_jax
from pshare_jax.engine.kv_store import page_shape
from pshare_jax.engine.orchestrator import Orchestrator
from pshare_jax.engine.prompt_pages import prompt_pages
from pshare_jax.engine.sources import checkpoint_sources
from pshare_jax.errors import ConfigError
from pshare_jax.kernels.kv_codec.api import page_codec
from pshare_jax.kernels.kv_codec.codebook import calibrate, supported
from pshare_jax.kv.store.file import PoolRequest
from pshare_jax.text.tokenizer import Tokenizer

LINKS = (0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
"""Rates of links, in GB/s."""

CODECS = ("planes", "top16")
_TIMED_BYTES = 100_000_000


@dataclass(frozen=True)
class CodecOptions:
    """What is measured.

    Args:
        base: the prefill checkpoint.
        calibration: files of text that codebooks are calibrated on.
        texts: files of the texts that are compressed, by name; `.jsonl` has `messages` a line.
        tokens: of each text at most.
        page_size: token slots of a KV page.
        pool_bytes: of a pool whose capacity is compared.
        repeats: of each measurement of time, of which the best counts.
    """

    base: str = "checkpoints/smollm2-135m"
    calibration: list[str] = field(default_factory=lambda: ["docs/serving.md", "docs/training.md"])
    texts: dict[str, str] = field(
        default_factory=lambda: {
            "code": "pshare_jax/core/decode.py",
            "chat": "pshare_jax/demo/questions.jsonl",
        }
    )
    tokens: int = 2048
    page_size: int = 64
    pool_bytes: int = 2**30
    repeats: int = 7


def run(options: CodecOptions) -> dict[str, Any]:
    """Measures both codecs.

    Returns:
        `{"options", "page_bytes", "copy_gb_s", "codecs": {name: {"ratio": {text: ratio}, "worst",
        "escapes": {text: share}, "encode_gb_s", "decode_gb_s", "capacity", "break_even_gb_s",
        "links": {rate: gain}, "links_pipelined"}}}`. A gain is the time of the page as it is by
        that of the compressed one.

    Raises:
        ConfigError: pages that cannot be compressed, or a text that is not there.
    """
    pages, layout_shape = kv_pages(options)
    sample = pages.pop("calibration")
    test = np.ascontiguousarray(np.moveaxis(np.concatenate(list(pages.values())), 0, 1))
    page_bytes = test[:, 0].nbytes
    result: dict[str, Any] = {
        "options": asdict(options),
        "page_bytes": page_bytes,
        "pages": {name: len(array) for name, array in pages.items()},
        "copy_gb_s": _copy_rate(test, options.repeats),
        "codecs": {},
    }
    for name in CODECS:
        result["codecs"][name] = _measure(name, sample, pages, test, layout_shape, options)
    return result


def kv_pages(options: CodecOptions) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
    """The base's KV of texts, and of what codebooks are calibrated on (`calibration`).

    Returns:
        Pages `[n, L, 2, kv_heads, page_size, head_dim]` uint16 by the name of their text, and the
        shape of one.

    Raises:
        ConfigError: pages that cannot be compressed, or a text that is not there.
    """
    config = ServeConfig(
        base=options.base,
        models=[ModelEntry("base")],
        max_model_len=options.tokens,
        page_size=options.page_size,
    )
    prepare_jax(config)
    base, sources = checkpoint_sources(config, compute_dtype(config))
    tokenizer = Tokenizer.load(Path(options.base) / TOKENIZER_FOLDER)
    engine = Orchestrator(config, base, sources, tokenizer)
    worker = engine.workers.prefill[0]
    worker.executor.warm_up(sends=True, receives=False)
    shape = page_shape(worker.executor.programs.layout)
    dtype = np.dtype(worker.executor.programs.layout.dtype).name
    if not supported(shape, dtype):
        raise ConfigError(f"pages of {dtype} {shape} are not compressed; bfloat16 ones are")
    texts = {"calibration": "\n".join(_text(file) for file in options.calibration)}
    texts |= {name: _text(file) for name, file in options.texts.items()}
    pages = {
        name: prompt_pages(worker, tokenizer.encode(text)[: options.tokens]).view(np.uint16)
        for name, text in texts.items()
    }
    return pages, shape


def _text(file: str) -> str:
    try:
        text = Path(file).read_text()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    if not file.endswith(".jsonl"):
        return text
    messages = [m for line in text.splitlines() for m in json.loads(line)["messages"]]
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def _measure(
    name: str,
    sample: np.ndarray,
    pages: dict[str, np.ndarray],
    test: np.ndarray,
    shape: tuple[int, ...],
    options: CodecOptions,
) -> dict[str, Any]:
    book = calibrate(name, sample)
    codec = page_codec(book)
    values, page_bytes = test[:, 0].size, test[:, 0].nbytes
    fixed = book.fixed_bytes(values)
    out = np.zeros(2 * page_bytes, np.uint8)
    lengths = []
    for index in range(test.shape[1]):
        length = codec.encode(test, index, out)
        assert length is not None, "a record is never twice as large as its page"
        lengths.append(length)
    # With the page's share of the codebook, as if a pool held a thousand pages.
    whole = np.array(lengths) + book.table.nbytes / 1000
    ends = np.cumsum([len(array) for array in pages.values()])[:-1]
    by_text = dict(zip(pages, np.split(whole, ends), strict=True))
    escapes = dict(zip(pages, np.split(np.array(lengths) - fixed, ends), strict=True))
    encode, decode = _rates(codec, test, out, options.repeats)
    ratio = page_bytes / float(whole.mean())
    slots = {
        kind: PoolRequest(shape, "bfloat16", page_bytes, options.pool_bytes, (kind,), lambda: None)
        .spec(kind)
        .slots
        for kind in ("raw", name)
    }
    return {
        "ratio": {text: page_bytes / float(sizes.mean()) for text, sizes in by_text.items()},
        "worst": page_bytes / float(whole.max()),
        "escapes": {text: float(counts.mean()) / values for text, counts in escapes.items()},
        "encode_gb_s": encode / 1e9,
        "decode_gb_s": decode / 1e9,
        "slots": slots,
        "capacity": slots[name] / slots["raw"],
        "break_even_gb_s": (1 - 1 / ratio) / (1 / encode + 1 / decode) / 1e9,
        "links": {str(link): _serial(link * 1e9, ratio, encode, decode) for link in LINKS},
        "links_pipelined": {
            str(link): _pipelined(link * 1e9, ratio, encode, decode) for link in LINKS
        },
    }


def _serial(link: float, ratio: float, encode: float, decode: float) -> float:
    return (1 / link) / (1 / encode + 1 / (ratio * link) + 1 / decode)


def _pipelined(link: float, ratio: float, encode: float, decode: float) -> float:
    return (1 / link) / max(1 / encode, 1 / (ratio * link), 1 / decode)


def _rates(codec: Any, test: np.ndarray, out: np.ndarray, repeats: int) -> tuple[float, float]:
    """Bytes of pages that are coded and decoded a second by one thread."""
    count = test.shape[1]
    records = []
    for index in range(count):
        length = codec.encode(test, index, out)
        records.append(out[:length].copy())
    back = np.empty_like(test)

    def encode(index: int) -> None:
        codec.encode(test, index, out)

    def decode(index: int) -> None:
        codec.decode(records[index], back, index)

    return _best(encode, test, repeats), _best(decode, test, repeats)


def _copy_rate(test: np.ndarray, repeats: int) -> float:
    back = np.empty_like(test)

    def copy(index: int) -> None:
        back[:, index] = test[:, index]

    return _best(copy, test, repeats) / 1e9


def _best(action: Callable[[int], None], test: np.ndarray, repeats: int) -> float:
    """Bytes of pages a second of the thread's own time, of the best repeat: others work, too."""
    count, page_bytes = test.shape[1], test[:, 0].nbytes
    rounds = max(1, _TIMED_BYTES // (count * page_bytes))
    best = float("inf")
    for _ in range(repeats):
        started = time.thread_time()
        for _ in range(rounds):
            for index in range(count):
                action(index)
        best = min(best, time.thread_time() - started)
    return rounds * count * page_bytes / best


def lines(result: dict[str, Any]) -> list[str]:
    """The result as lines of text."""
    shown = [
        f"Pages of {result['page_bytes']} bytes; copying them: {result['copy_gb_s']:.1f} GB/s.",
        "",
    ]
    for name, found in result["codecs"].items():
        ratios = ", ".join(f"{text} {ratio:.3f}" for text, ratio in found["ratio"].items())
        shown += [
            f"{name}: ratio {ratios}, worst page {found['worst']:.3f}; a pool holds "
            f"{found['capacity']:.3f} times as many pages",
            f"  encode {found['encode_gb_s']:.1f}, decode {found['decode_gb_s']:.1f} GB/s; pays, "
            f"one after the other, below {found['break_even_gb_s']:.2f} GB/s",
            "  gain by link (GB/s): "
            + ", ".join(f"{link}: {gain:.2f}" for link, gain in found["links"].items()),
            "  pipelined:           "
            + ", ".join(f"{link}: {gain:.2f}" for link, gain in found["links_pipelined"].items()),
        ]
    return shown
