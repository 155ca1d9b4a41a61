"""`pshare worker`: one worker process of a cluster, for frontends that connect to it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import math
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from aiohttp import web

from pshare_jax.cluster.secret import is_loopback, read_token, split_address
from pshare_jax.cluster.tls import ClusterTls, cluster_tls
from pshare_jax.config import Role, ServeConfig
from pshare_jax.config_files import load_config
from pshare_jax.errors import ConfigError, GangLostError, PshareError
from pshare_jax.serve import gang
from pshare_jax.serve.logs import open_standard_streams, say, set_up

if TYPE_CHECKING:
    from pshare_jax.cluster.gang import GangLeader
    from pshare_jax.cluster.station import Station
    from pshare_jax.serve.lifecycle import StopSignal

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
"""Between two looks at whether there are frontends."""

READY = "pshare_jax: worker ready at "

_DESCRIPTION = (
    "Runs one engine's prefill or decode side, or both over one pool, for frontends: "
    "`pshare serve --workers=HOST:PORT,...`. All processes get the same configuration; every key "
    "of it is a flag too. SIGTERM drains: frontends send nothing more, and what runs here ends."
)


@dataclass(frozen=True)
class Secrets:
    """By which the processes of a cluster know each other: a token, certificates, both or none."""

    token: str
    tls: ClusterTls | None

    @property
    def scheme(self) -> str:
        """Of worker processes' URLs."""
        return "https" if self.tls else "http"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the worker; returns the exit code: 2 for a configuration that cannot be served."""
    parser = argparse.ArgumentParser("pshare worker", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--role", choices=get_args(Role), required=True)
    parser.add_argument("--name", required=True, help="its own, such as prefill0")
    parser.add_argument("--listen", default="127.0.0.1:0", help="HOST:PORT; port 0 is a free one")
    parser.add_argument("--listen-fd", type=int, help="a socket that listens already, inherited")
    parser.add_argument("--token-file", help="short for --cluster.token_file")
    for name, what in (("cert", "certificate"), ("key", "private key"), ("ca", "CA")):
        parser.add_argument(f"--tls-{name}", help=f"{what}; short for --cluster.tls_{name}")
    parser.add_argument(
        "--advertise", help="HOST:PORT at which other hosts get pages; --listen unless given"
    )
    parser.add_argument(
        "--alone-seconds",
        type=float,
        default=math.inf,
        help="ends after so long without a frontend; never, unless given",
    )
    gang.add_flags(parser)
    options, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if options.token_file:
        rest.append(f"--cluster.token_file={options.token_file}")
    for name in ("tls_cert", "tls_key", "tls_ca"):
        if path := getattr(options, name):
            rest.append(f"--cluster.{name}={path}")
    place = None
    try:
        config = load_config(ServeConfig, rest, prog="pshare worker", description=_DESCRIPTION)
        open_standard_streams()
        set_up()
        logging.getLogger("jax").setLevel(logging.WARNING)
        secrets = Secrets(read_token(config.cluster.token_file), cluster_tls(config.cluster))
        place = gang.place_of(options, config)
        with _bind(options.listen, options.listen_fd, secrets) as sock:
            if place is not None and place.rank:
                code = asyncio.run(gang.follow(place, config, options, sock, secrets))
            else:
                code = asyncio.run(_serve(config, options, sock, secrets, place))
    except GangLostError as error:
        log.error("ending: %s", error)
        code = 1
    except PshareError as error:
        say(f"pshare worker: {error}", sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except Exception:
        if place is None:
            raise
        log.exception("ending")
        code = 1
    if place is not None:
        gang.end(code)
    return code


def _bind(address: str, descriptor: int | None, secrets: Secrets) -> socket.socket:
    """The socket to listen on.

    Raises:
        ConfigError: it cannot be had, or everybody could reach it and there is no secret.
    """
    if descriptor is not None:
        return socket.socket(fileno=descriptor)
    host, port = split_address(address)
    if not secrets.token and not secrets.tls and not is_loopback(host):
        raise ConfigError(
            f"--listen={address}: others can reach that; name a --token-file, the same for all "
            "processes of the cluster, or certificates (--tls-cert, --tls-key, --tls-ca)"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ConfigError(f"--listen={address}: cannot listen there: {error}") from error


def _reachable(host: str, port: int) -> str:
    """Where others reach a socket; one that listens on all addresses has this machine's."""
    if host in ("0.0.0.0", "::"):
        with contextlib.suppress(OSError):
            host = socket.gethostbyname(socket.gethostname())
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def _serve(
    config: ServeConfig,
    options: argparse.Namespace,
    sock: socket.socket,
    secrets: Secrets,
    place: gang.Place | None = None,
) -> int:
    """Serves until a signal, or until a worker fails; returns the exit code.

    With a `place` it leads a gang, and ends when another process of that does.
    """
    # Imported late: jax takes seconds, which --help and a typing error need not wait for.
    from pshare_jax.cluster.station import Station
    from pshare_jax.engine.hosted import HostedWorkers
    from pshare_jax.kv.peers import Peers
    from pshare_jax.serve.lifecycle import StopSignal
    from pshare_jax.serve.worker_app import worker_app

    stop = StopSignal()
    host, port = sock.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    reachable = _reachable(host, port)
    tls = secrets.tls
    leader = None
    if place is not None:
        leader = await _lead(place, config, options, secrets, stop)
    hosted = HostedWorkers.from_config(
        config,
        options.role,
        options.name,
        f"{secrets.scheme}://{options.advertise or reachable}",
        Peers(secrets.token, tls.client if tls else None),
        split_address(reachable)[0],
    )
    if leader is not None:
        await asyncio.to_thread(leader.check_built, gang.identity(hosted))
        hosted.lead(leader.call, leader.wait_compiled)
    beat = config.cluster.beat_seconds
    station = Station(
        hosted.shape,
        hosted.parts,
        hosted.stats,
        beat,
        hosted.prepare,
        hosted.modules,
        hosted.pools,
        hosted.taken,
    )
    app = worker_app(hosted, station, secrets.token, certified=tls is not None)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    await web.SockSite(runner, sock, ssl_context=tls.server if tls else None).start()
    log.info("%s listens on %s, warming up", options.name, address)
    loop = asyncio.get_running_loop()
    failed: asyncio.Future[str] = loop.create_future()

    def fail(worker: str, reason: str) -> None:
        loop.call_soon_threadsafe(lambda: failed.done() or failed.set_result(f"{worker}: {reason}"))

    await asyncio.to_thread(hosted.start, station.send, fail)
    assert hosted.thread is not None
    gc.collect()
    gc.freeze()
    station.open(hosted.thread)
    say(f"{READY}{secrets.scheme}://{address}", sys.stdout)
    stopped = asyncio.ensure_future(stop.received.wait())
    alone = asyncio.ensure_future(_until_alone(station, options.alone_seconds))
    await asyncio.wait({stopped, failed, alone}, return_when=asyncio.FIRST_COMPLETED)
    alone.cancel()
    if failed.done():
        # Its pool may be gone. Frontends notice the end of their links, and go elsewhere.
        log.error("ending: %s", failed.result())
        hosted.pages.offers.close()
        logging.shutdown()
        os._exit(1)
    if not await station.drain(config.server.drain_seconds):
        log.warning("still needed after %g seconds: ending", config.server.drain_seconds)
    await station.close()
    await runner.cleanup()
    await asyncio.to_thread(hosted.stop)
    if leader is not None:
        leader.close()
    log.info("drained")
    return 0


async def _lead(
    place: gang.Place,
    config: ServeConfig,
    options: argparse.Namespace,
    secrets: Secrets,
    stop: StopSignal,
) -> GangLeader:
    """Waits for the other processes of the gang, unless there is a signal, and joins them."""
    loop = asyncio.get_running_loop()

    def lost(reason: str) -> None:
        log.error("ending: %s", reason)
        gang.end(1)

    gathering = asyncio.ensure_future(
        asyncio.to_thread(gang.gather, place, config, options, secrets)
    )
    stopped = asyncio.ensure_future(stop.received.wait())
    await asyncio.wait({gathering, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if stopped.done():
        gang.end(0)
    stopped.cancel()
    start = await gathering

    def drain() -> None:
        loop.call_soon_threadsafe(stop.received.set)

    return await asyncio.to_thread(start, lost, drain)


async def _until_alone(station: Station, seconds: float) -> None:
    """Returns once there has been no frontend for so long."""
    looks = 0
    while looks * _LOOK_SECONDS < seconds:
        await asyncio.sleep(_LOOK_SECONDS)
        looks = 0 if station.num_frontends else looks + 1
    log.warning("no frontend for %g seconds: ending", seconds)


if __name__ == "__main__":
    sys.exit(main())
