"""What tests of coded transfers share; programs are compiled once for all files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import msgspec
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
from tests.cluster.harness import Loop
from tests.kv.coded import CONFIG, LAYOUT, Pair, Server


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
