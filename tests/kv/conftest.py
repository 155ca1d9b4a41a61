"""What tests of transfers share, plain and coded; programs are compiled once for all files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import msgspec
import numpy as np
import pytest
from aiohttp import web

from pshare_jax.config import DecodeConfig
from pshare_jax.kernels.backends import on_mesh
from pshare_jax.kv import direct as kv_direct
from pshare_jax.kv.direct import DirectOffers
from pshare_jax.kv.offers import PREFIX, file_of
from pshare_jax.kv.peers import Claimed
from pshare_jax.kv.ways import Way
from pshare_jax.runtime.programs import Programs
from pshare_jax.runtime.steps import StepSpec
from pshare_jax.serve import worker_app
from pshare_jax.sharding.mesh import carve
from tests.cluster.harness import TOKEN, Loop
from tests.kv.coded import CONFIG, LAYOUT, Pair, Server
from tests.kv.ends import Link, contents_of, programs_of


@pytest.fixture(scope="package")
def coded_programs() -> list[Programs]:
    decode = DecodeConfig(max_num_seqs=2, batch_buckets=[1])
    meshes = carve(jax.devices(), 1, 1, 1, 1)
    return [
        Programs(StepSpec(CONFIG, on_mesh("xla", mesh.size), mesh), LAYOUT, mesh, 64, [8], decode)
        for (mesh,) in meshes
    ]


@pytest.fixture(scope="module")
def coded_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("host")
    loop, app = Loop(), web.Application()
    server = Server("", folder)

    async def serve(request: web.Request) -> web.StreamResponse:
        transfer = int(request.match_info["transfer"], 16)
        (found,) = (f for f in folder.glob(f"{PREFIX}*") if file_of(f, transfer).exists())
        return await worker_app.send_pages(request, found, server.coder)

    async def claim(request: web.Request) -> web.StreamResponse:
        answer = await worker_app.claim_pages(request, server.direct)
        assert isinstance(answer.body, bytes)
        said = msgspec.json.decode(answer.body, type=Claimed)
        return web.Response(body=msgspec.json.encode(server.claimed(said)))

    async def settle(request: web.Request) -> web.StreamResponse:
        return web.Response()

    app.router.add_get("/pages/{transfer:[0-9a-f]{16}}", serve)
    app.router.add_post("/pages/{transfer:[0-9a-f]{16}}/claim", claim)
    app.router.add_delete("/pages/{transfer:[0-9a-f]{16}}/claim", settle)
    runner = web.AppRunner(app, access_log=None)
    loop.run(runner.setup())
    loop.run(web.TCPSite(runner, "127.0.0.1", 0).start())
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield server
    loop.run(runner.cleanup())
    loop.close()


@pytest.fixture(scope="module")
def coded_direct() -> Iterator[list[DirectOffers]]:
    with pytest.MonkeyPatch.context() as patch:
        # The machine may be busy.
        patch.setattr(kv_direct, "PULL_SECONDS", 60.0)
        yield [DirectOffers("127.0.0.1") for _ in range(2)]


@pytest.fixture
def new_pair(
    coded_programs: list[Programs],
    coded_server: Server,
    coded_direct: list[DirectOffers],
    tmp_path: Path,
) -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(way: Way, *codecs: str) -> Pair:
        sends, reads = codecs or ("planes", "planes")
        pair = Pair(way, coded_programs, coded_server, coded_direct, tmp_path, (sends, reads))
        made.append(pair)
        return pair

    yield make
    for pair in made:
        pair.close()
    coded_server.mangle, coded_server.header = None, lambda coding: coding.header()
    coded_server.claimed = lambda claimed: claimed


@pytest.fixture(scope="module")
def direct() -> Iterator[list[DirectOffers]]:
    """Of two processes, which are patient: the machine may be busy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_direct, "PULL_SECONDS", 60.0)
        yield [DirectOffers("127.0.0.1") for _ in range(2)]


@pytest.fixture(scope="module")
def pages_server(
    tmp_path_factory: pytest.TempPathFactory, direct: list[DirectOffers]
) -> Iterator[tuple[Path, str]]:
    """A folder of offers that is another host's, and the URL where that serves them."""
    folder = tmp_path_factory.mktemp("host")
    loop, app = Loop(), web.Application()

    async def serve(request: web.Request) -> web.StreamResponse:
        assert request.headers["Authorization"] == f"Bearer {TOKEN}"
        (found,) = (folder / "prefill0").glob(f"{PREFIX}*")
        return await worker_app.send_pages(request, found)

    async def claim(request: web.Request) -> web.StreamResponse:
        assert request.headers["Authorization"] == f"Bearer {TOKEN}"
        return await worker_app.claim_pages(request, direct[0])

    app.router.add_get("/pages/{transfer:[0-9a-f]{16}}", serve)

    async def settle(request: web.Request) -> web.StreamResponse:
        direct[0].settle(int(request.match_info["transfer"], 16))
        return web.Response()

    app.router.add_post("/pages/{transfer:[0-9a-f]{16}}/claim", claim)
    app.router.add_delete("/pages/{transfer:[0-9a-f]{16}}/claim", settle)
    runner = web.AppRunner(app, access_log=None)
    loop.run(runner.setup())
    loop.run(web.TCPSite(runner, "127.0.0.1", 0).start())
    yield folder, f"http://127.0.0.1:{runner.addresses[0][1]}"
    loop.run(runner.cleanup())
    loop.close()


@pytest.fixture(scope="package")
def two_meshes() -> list[Programs]:
    prefill, decode = carve(jax.devices(), 1, 1, 1, 1)
    return [programs_of(prefill[0]), programs_of(decode[0])]


@pytest.fixture(params=["device_put", "same-mesh", "shm", "http", "jax-transfer"])
def link(
    request: pytest.FixtureRequest,
    two_meshes: list[Programs],
    tmp_path: Path,
    pages_server: tuple[Path, str],
    direct: list[DirectOffers],
) -> Iterator[Link]:
    """Both ends. At the end nothing is on offer, and nothing is on its way."""
    match request.param:
        case "device_put":
            link = Link("device_put", two_meshes)
        case "same-mesh":
            link = Link("same-mesh", two_meshes[:1])
        case "shm":
            link = Link("shm", two_meshes, tmp_path)
        case "jax-transfer":
            link = Link("jax-transfer", two_meshes, *pages_server, direct)
        case _:
            link = Link("http", two_meshes, *pages_server)
    yield link
    link.withdraw()
    assert len(link.exchange) == 0
    assert link.sender.num_arriving == link.receiver.num_arriving == 0
    link.close()


@pytest.fixture
def untouched(link: Link) -> Iterator[None]:
    """Both pools keep every bit."""
    before = contents_of(link.source), contents_of(link.target)
    yield
    np.testing.assert_array_equal(contents_of(link.source), before[0])
    np.testing.assert_array_equal(contents_of(link.target), before[1])
