"""`bench wire`: pages from another process, as they are and coded, over links of several rates.

A process has pages of real KV on offer, and this one gets them, by what workers of different hosts
use. The link is the loopback, which is slowed down: what is sent waits until the link would have
carried it, while the next page is coded. From device to device the link is as it is.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from aiohttp import web
from jax.sharding import SingleDeviceSharding

from pshare_jax.bench.codec import CodecOptions, kv_pages
from pshare_jax.config import KvCodec
from pshare_jax.core.buckets import TRANSFER_BUCKETS, pieces
from pshare_jax.kv.coding import PageCoder, usable_codecs
from pshare_jax.kv.direct import DirectOffers
from pshare_jax.kv.links import Links
from pshare_jax.kv.offers import OfferFolder
from pshare_jax.kv.peers import Peers
from pshare_jax.kv.pulling import PagePuller, records_of
from pshare_jax.kv.reading import PageReader, Read, Traffic
from pshare_jax.runtime.layout import PageLayout
from pshare_jax.serve.worker_app import claim_pages, send_pages

SETTINGS: tuple[KvCodec, ...] = ("raw", "planes", "top16", "auto")
"""Of `cluster.codec`."""

DIRECT = "jax-transfer"
_SECONDS = 60.0
_FIRST = 5
"""Transfers that are not counted."""
_GB = 1e9


@dataclass(frozen=True)
class WireOptions:
    """What is measured.

    Args:
        base: the prefill checkpoint.
        text: file whose KV is sent.
        links: rates in GB/s; 0 is the loopback as it is.
        pages: of a transfer.
        rounds: transfers of each kind.
        page_size: token slots of a page.
        folder: for what is on offer, in shared memory.
    """

    base: str = "checkpoints/smollm2-135m"
    text: str = "pshare_jax/core/decode.py"
    links: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.5, 1.0, 2.0, 0.0])
    pages: int = 16
    rounds: int = 12
    page_size: int = 64
    folder: str = "/dev/shm"


def run(options: WireOptions) -> dict[str, Any]:
    """Measures every setting over every link.

    Returns:
        `{"options", "page_bytes", "rows": [{"link": GB/s or "jax-transfer", "codec": setting,
        "gb_s": of pages, of the median transfer, "wire_share": bytes that came by those of the
        pages, "coded": share of transfers}]}`.

    Raises:
        CheckpointError: the base cannot be loaded.
        ConfigError: pages that cannot be compressed, or a text that is not there.
    """
    found, shape = kv_pages(
        CodecOptions(
            base=options.base,
            calibration=[options.text],
            texts={},
            tokens=options.pages * options.page_size,
            page_size=options.page_size,
        )
    )
    staged = np.ascontiguousarray(np.moveaxis(found["calibration"][: options.pages], 0, 1))
    layers, _, heads, page_size, head_dim = shape
    layout = PageLayout(layers, heads, head_dim, page_size, ml_dtypes.bfloat16)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="pshare-bench-wire-") as folder:
        pages = Path(folder) / "pages.npy"
        np.save(pages, staged)
        rows = [
            row
            for link in [*options.links, DIRECT]
            for row in _measure(options, layout, staged, pages, link)
        ]
    return {"options": asdict(options), "page_bytes": layout.bytes_per_page, "rows": rows}


def _measure(
    options: WireOptions,
    layout: PageLayout,
    staged: np.ndarray,
    pages: Path,
    link: float | str,
    settings: Sequence[KvCodec] = SETTINGS,
) -> list[dict[str, Any]]:
    """All settings over one link; the first transfers tell the codebook, and the link's rate."""
    count, rows = staged.shape[1], []
    with _Sender(pages, count, link) as sender:
        for setting in settings:
            url, traffic, seconds = sender.begin(setting), Traffic(), []
            codecs = usable_codecs(setting, staged[:, 0].shape, "bfloat16")
            read = _reader(layout, codecs, setting, traffic, link, url)
            for transfer in range(options.rounds + _FIRST):
                sender.offer(transfer)
                started = time.perf_counter()
                found = read(transfer, count)
                seconds.append(time.perf_counter() - started)
                _check(found, staged, count)
            coded = sum(raw for (_, codec), raw in traffic.raw.items() if codec != "raw")
            rows.append(
                {
                    "link": link,
                    "codec": setting,
                    "gb_s": staged.nbytes / statistics.median(seconds[_FIRST:]) / _GB,
                    "wire_share": traffic.wire.total() / traffic.raw.total(),
                    "coded": coded / traffic.raw.total(),
                }
            )
    return rows


def _reader(
    layout: PageLayout,
    codecs: list[str],
    setting: KvCodec,
    traffic: Traffic,
    link: float | str,
    url: str,
) -> Callable[[int, int], Read]:
    if link == DIRECT:
        direct = DirectOffers("127.0.0.1")
        staging = SingleDeviceSharding(jax.devices()[0])
        puller = PagePuller(layout, staging, Peers(), setting, codecs, traffic)

        def pull(transfer: int, count: int) -> Read:
            found = puller.pull(direct, transfer, url, count)
            puller.settle(url, transfer)
            return found

        return pull
    reader = PageReader(layout, Peers(), Links(setting, codecs), traffic)
    return lambda transfer, count: reader.from_url(transfer, url, count)


def _check(found: Read, staged: np.ndarray, count: int) -> None:
    at = 0
    for piece, (length, _) in zip(found.pieces, pieces(count, TRANSFER_BUCKETS), strict=True):
        bits = np.asarray(piece).view(np.uint16)[:, :length]
        assert np.array_equal(bits, staged[:, at : at + length]), "pages came other than they were"
        at += length


class _Sender:
    """The other process."""

    def __init__(self, pages: Path, count: int, link: float | str):
        processes = multiprocessing.get_context("spawn")
        self._pipe, there = processes.Pipe()
        arguments = there, pages, count, link
        self._process = processes.Process(target=_main, args=arguments, daemon=True)
        self._process.start()
        there.close()

    def __enter__(self) -> _Sender:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def begin(self, setting: KvCodec) -> str:
        """Has it serve by a setting, and with no codebook yet; the URL."""
        return self._call(setting)

    def offer(self, transfer: int) -> None:
        """Has it put all pages on offer."""
        self._call(transfer)

    def _call(self, what: KvCodec | int) -> Any:
        self._pipe.send(what)
        if not self._pipe.poll(_SECONDS):
            raise TimeoutError("the process that has pages on offer does not answer")
        return self._pipe.recv()


def _main(pipe: Connection, pages: Path, count: int, link: float | str) -> None:
    staged = np.load(pages)
    loop = asyncio.new_event_loop()
    serving: _Serving | None = None
    try:
        while True:
            asked = loop.run_until_complete(asyncio.to_thread(pipe.recv))
            if not isinstance(asked, int):
                serving = _Serving(staged, pages.parent, link, asked)
                pipe.send(loop.run_until_complete(serving.start()))
                continue
            assert serving is not None
            serving.offer(asked, count)
            pipe.send(None)
    except EOFError:
        os._exit(0)  # nobody asks any more; what the transfer server has is of no use


class _Serving:
    """What the other process has on offer, by one setting."""

    def __init__(self, staged: np.ndarray, parent: Path, link: float | str, setting: KvCodec):
        shape = staged[:, 0].shape
        self._coder = PageCoder(setting, shape, "bfloat16")
        self._folder = OfferFolder(parent)
        self._link = link
        self._pieces = _cut(staged)
        self._direct: DirectOffers | None = None
        if link == DIRECT:
            layout = PageLayout(shape[0], shape[2], shape[4], shape[3], ml_dtypes.bfloat16)
            staging = SingleDeviceSharding(jax.devices()[0])
            self._direct = DirectOffers("127.0.0.1")
            self._direct.code_by(self._coder, records_of(layout, staging, setting))
            self._on_mesh = [
                jax.device_put(piece.view(ml_dtypes.bfloat16), staging) for piece in self._pieces
            ]

    def offer(self, transfer: int, count: int) -> None:
        """Puts all pages on offer; not before the codebook is there."""
        self._coder.settle()
        if self._direct is not None:
            self._direct.put(transfer, "sender", self._on_mesh, count)
        else:
            self._folder.put(transfer, "sender", self._pieces, count, time.monotonic())

    async def start(self) -> str:
        """Serves what is on offer, at the rate of the link; the URL."""
        app = web.Application()
        app.router.add_get("/pages/{transfer:[0-9a-f]{16}}", self._send)
        app.router.add_post("/pages/{transfer:[0-9a-f]{16}}/claim", self._claim)
        app.router.add_delete("/pages/{transfer:[0-9a-f]{16}}/claim", self._settle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    async def _send(self, request: web.Request) -> web.StreamResponse:
        return await send_pages(request, self._folder.path, self._coder, _Throttle(self._link))

    async def _claim(self, request: web.Request) -> web.Response:
        return await claim_pages(request, self._direct)

    async def _settle(self, request: web.Request) -> web.Response:
        if self._direct is not None:
            self._direct.settle(int(request.match_info["transfer"], 16))
        return web.Response()


def _cut(staged: np.ndarray) -> list[np.ndarray]:
    """Pieces as a gather gives them, padded."""
    cut, at = [], 0
    for length, bucket in pieces(staged.shape[1], TRANSFER_BUCKETS):
        piece = np.zeros((staged.shape[0], bucket, *staged.shape[2:]), staged.dtype)
        piece[:, :length] = staged[:, at : at + length]
        cut.append(piece)
        at += length
    return cut


class _Throttle:
    """Waits after each piece of data until a link of a rate would have carried all so far."""

    def __init__(self, link: float | str):
        self._rate = link * _GB if isinstance(link, float) else 0.0
        self._free = 0.0

    async def __call__(self, num_bytes: int) -> None:
        if self._rate:
            self._free = max(self._free, time.perf_counter()) + num_bytes / self._rate
            await asyncio.sleep(max(self._free - time.perf_counter(), 0.0))


def lines(result: dict[str, Any]) -> list[str]:
    """The table as lines of text."""
    links = dict.fromkeys(row["link"] for row in result["rows"])
    shown = [
        f"GB/s of pages of {result['page_bytes']} bytes, {result['options']['pages']} in a "
        "transfer; in brackets bytes on the wire by those of the pages",
        "",
        f"| link, GB/s | {' | '.join(SETTINGS)} |",
        f"|---|{'--:|' * len(SETTINGS)}",
    ]
    for link in links:
        name = "loopback" if link == 0 else str(link)
        cells = [
            f"{row['gb_s']:.2f} ({row['wire_share']:.2f})"
            for row in result["rows"]
            if row["link"] == link
        ]
        shown.append(f"| {name} | {' | '.join(cells)} |")
    return shown
