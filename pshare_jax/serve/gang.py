"""The processes of a gang: the first one is a worker like any other, the others do what it says.

All are started as `pshare worker` with the same configuration, role and name, each with its own
`--gang-rank`. Whoever notices that another has ended ends, too; whoever starts processes starts all
of them again.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from pshare_jax.cluster.secret import is_loopback, split_address
from pshare_jax.config import ServeConfig
from pshare_jax.errors import ConfigError

if TYPE_CHECKING:
    from pshare_jax.cluster.gang import GangFollower, GangLeader
    from pshare_jax.engine.hosted import HostedWorkers
    from pshare_jax.serve.worker import Secrets

log = logging.getLogger(__name__)

NAME_SECONDS = 1.0
"""Between two attempts to listen at a name that nobody knows yet."""


@dataclass(frozen=True)
class Place:
    """Of a process in its gang.

    Args:
        size: processes of the gang.
        rank: which one this is.
        address: `HOST:PORT` of the first one, where the others meet it.
        descriptor: of a socket that listens there, if one was inherited.
    """

    size: int
    rank: int
    address: str
    descriptor: int | None = None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds what says where a process is in its gang."""
    parser.add_argument(
        "--gang-rank", type=int, help="of this process, where several hosts have one mesh; from 0"
    )
    parser.add_argument(
        "--gang-coordinator", help="HOST:PORT at which process 0 waits for the others"
    )
    parser.add_argument("--gang-fd", type=int, help="a socket that listens there, inherited")


def place_of(options: argparse.Namespace, config: ServeConfig) -> Place | None:
    """A process's place in its gang; None of one that is alone.

    Raises:
        ConfigError: a place that does not exist, or none where there must be one.
    """
    # Imported late, see `worker._serve`.
    from pshare_jax.engine.gang import hosts_of

    size = hosts_of(config, options.role)
    rank, address = options.gang_rank, options.gang_coordinator
    if size == 1:
        if rank or address:
            raise ConfigError(
                f"--gang-rank, --gang-coordinator: the mesh of a {options.role} worker is of one "
                "host; set prefill.hosts or decode.hosts"
            )
        return None
    if rank is None or not 0 <= rank < size or not (address or options.gang_fd is not None):
        raise ConfigError(
            f"--gang-rank must be 0 .. {size - 1}, and --gang-coordinator the address of process "
            f"0, since {size} hosts have a {options.role} worker's mesh together"
        )
    return Place(size, rank, address or "", options.gang_fd)


def gather(
    place: Place, config: ServeConfig, options: argparse.Namespace, secrets: Secrets
) -> Callable[[Callable[[str], None], Callable[[], None]], GangLeader]:
    """Waits for all other processes of the gang that this one leads. Blocks.

    Returns:
        What begins to watch them, and joins their worlds; see `GangLeader.start`.

    Raises:
        ConfigError: an address that cannot be had, or that others can reach without a secret.
    """
    from pshare_jax.cluster.gang import GangLeader
    from pshare_jax.engine.gang import facts, free_coordinator, join_worlds

    listener = _listen(place, secrets)
    host = split_address(place.address)[0] if place.address else listener.getsockname()[0]
    shared = facts(config, options.role, options.name)
    leader = GangLeader(listener, place.size, shared, secrets.token, secrets.tls)
    leader.gather()

    def start(on_lost: Callable[[str], None], on_drain: Callable[[], None]) -> GangLeader:
        coordinator = free_coordinator(str(socket.getaddrinfo(host, None)[0][4][0]))
        leader.start(coordinator, on_lost, on_drain)
        join_worlds(coordinator, 0, place.size)
        return leader

    return start


def identity(hosted: HostedWorkers) -> str:
    """What the processes of a gang must have built alike."""
    return msgspec.json.encode(hosted.shape).decode()


async def follow(
    place: Place,
    config: ServeConfig,
    options: argparse.Namespace,
    sock: socket.socket,
    secrets: Secrets,
) -> int:
    """Does what the first process says, until that ends; returns the exit code."""
    from pshare_jax.cluster.gang import GangFollower
    from pshare_jax.engine.gang import facts
    from pshare_jax.serve.lifecycle import StopSignal

    stop = StopSignal()
    shared = facts(config, options.role, options.name)
    follower = GangFollower(
        place.address, place.rank, place.size, shared, secrets.token, secrets.tls
    )
    runner = await _health(sock)
    following = asyncio.ensure_future(
        asyncio.to_thread(_follow, follower, place, config, options, runner.app)
    )
    stopped = asyncio.ensure_future(stop.received.wait())
    await asyncio.wait({following, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if not following.done():
        if runner.app[STATE]["status"] == "joining":
            end(0)
        # The first process drains, and then says that it is over.
        follower.drain()
    stopped.cancel()
    await following
    await runner.cleanup()
    log.info("the gang has ended in good order")
    return 0


def end(code: int) -> None:
    """Ends the process at once: JAX would wait for all others first, as long as it takes."""
    logging.shutdown()
    os._exit(code)


STATE = web.AppKey("state", dict[str, str])


def _follow(
    follower: GangFollower,
    place: Place,
    config: ServeConfig,
    options: argparse.Namespace,
    app: web.Application,
) -> None:
    from pshare_jax.engine.gang import join_worlds
    from pshare_jax.engine.hosted import HostedWorkers

    def lost(reason: str) -> None:
        log.error("ending: %s", reason)
        end(1)

    follower.join(lost)
    app[STATE]["status"] = "warming_up"
    join_worlds(follower.coordinator, place.rank, place.size)
    hosted = HostedWorkers.from_config(config, options.role, options.name, leads=False)
    try:
        replay = hosted.replay()
        follower.built(identity(hosted))
        log.info("process %d of %s follows", place.rank, options.name)
        app[STATE]["status"] = "ok"
        compiled = 0
        for run in follower.calls():
            replay.run(run)
            if run.compiles:
                compiled += 1
                follower.compiled(compiled)
    finally:
        hosted.stop()
        follower.close()


async def _health(sock: socket.socket) -> web.AppRunner:
    """Answers `/health` and `/ready` for whoever looks after the process."""
    app = web.Application()
    app[STATE] = {"status": "joining"}

    async def health(request: web.Request) -> web.Response:
        return web.json_response(request.app[STATE])

    async def ready(request: web.Request) -> web.Response:
        state = request.app[STATE]
        return web.json_response(state, status=200 if state["status"] == "ok" else 503)

    app.router.add_get("/health", health)
    app.router.add_get("/ready", ready)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.SockSite(runner, sock).start()
    return runner


def _listen(place: Place, secrets: Secrets) -> socket.socket:
    """The socket at which the first process waits for the others.

    Raises:
        ConfigError: it cannot be had, or everybody could reach it and there is no secret.
    """
    if place.descriptor is not None:
        return socket.socket(fileno=place.descriptor)
    host, port = split_address(place.address)
    if not secrets.token and not secrets.tls and not is_loopback(host):
        raise ConfigError(
            f"--gang-coordinator={place.address}: others can reach that; name a --token-file, or "
            "certificates"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    while True:
        try:
            return socket.create_server((host, port), family=family, backlog=16)
        except socket.gaierror as error:
            # A pod is there before its name.
            log.info("--gang-coordinator=%s: %s", place.address, error)
            time.sleep(NAME_SECONDS)
        except OSError as error:
            raise ConfigError(
                f"--gang-coordinator={place.address}: cannot listen there: {error}"
            ) from error
