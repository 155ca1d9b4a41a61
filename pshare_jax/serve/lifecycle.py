"""A server's life: listen, warm up, serve, drain, end."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable

from aiohttp import web

from pshare_jax.config import ServerConfig
from pshare_jax.errors import ConfigError
from pshare_jax.runtime.host_memory import return_freed_memory
from pshare_jax.serve.access_log import access_log_options
from pshare_jax.serve.api_keys import load_keys
from pshare_jax.serve.app import build_app
from pshare_jax.serve.engine_api import Engine
from pshare_jax.serve.http_errors import JsonRunner
from pshare_jax.serve.service import SERVICE, Service
from pshare_jax.serve.tls import tls_context

log = logging.getLogger(__name__)

# How long a finished or aborted handler may take to write what it has left.
SHUTDOWN_SECONDS = 2.0
SWITCH_SECONDS = 0.001
# Connections that wait to be taken, as far as the system allows: one more is dropped by it, and its
# client tries again only after a second. And how many are taken before others have their turn.
BACKLOG, ACCEPTED = 2048, 128
# How long a client may go on sending a body that nobody reads, so that it gets to the answer.
LINGER_SECONDS = 10.0
_POSITIVE = (
    "max_n",
    "max_prompts",
    "max_fanout",
    "max_scored_tokens",
    "max_body_items",
    "worker_threads",
)


def bind(config: ServerConfig, descriptor: int | None = None) -> socket.socket:
    """A socket that listens on the configured address, so that nobody else can have it.

    Who connects before `HttpServer.start` waits.

    Args:
        config: the HTTP side.
        descriptor: a socket that was inherited and listens already, in place of the address.

    Raises:
        ConfigError: the address cannot be had, or a limit, keys or a file of TLS cannot be used.
    """
    if not 0 <= config.port <= 65535:
        raise ConfigError(f"server.port must be between 0 and 65535, got {config.port}")
    for name in _POSITIVE:
        if (value := getattr(config, name)) < 1:
            raise ConfigError(f"server.{name} must be at least 1, got {value}")
    if config.ping_seconds < 0:
        raise ConfigError(f"server.ping_seconds must not be negative, got {config.ping_seconds}")
    load_keys(config)
    tls_context(config)
    if descriptor is not None:
        return socket.socket(fileno=descriptor)
    sock = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        # Two sockets may be bound to one address, and only one listens: the error must come now.
        sock.listen(BACKLOG)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise ConfigError(
            f"server.host, server.port: cannot listen on {config.host}:{config.port}: {error}"
        ) from error
    return sock


def url_of(sock: socket.socket, scheme: str = "http") -> str:
    """The URL of a bound socket, with the port it really has."""
    host, port = sock.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class HttpServer:
    """The application on a socket.

    Attributes:
        service: the state its handlers share.
    """

    def __init__(self, engine: Engine):
        config = engine.config.server
        app = build_app(engine)
        self._tls = tls_context(config)
        self.service: Service = app[SERVICE]
        self._runner = JsonRunner(
            app,
            # Bodies are decompressed with a bound, off the loop, and their errors told apart.
            auto_decompress=False,
            # A client that goes away cancels its handler, which gives up its sequences.
            handler_cancellation=True,
            # Also bounds how long a connection may take to send its headers.
            keepalive_timeout=config.read_timeout_seconds,
            lingering_time=min(LINGER_SECONDS, config.read_timeout_seconds),
            **access_log_options(config.access_log),
            server_header=config.server_header,
            shutdown_timeout=SHUTDOWN_SECONDS,
        )

    async def start(self, sock: socket.socket) -> None:
        """Answers on `sock`, which listens already."""
        # For each system call of a request the loop gives the interpreter away, and waits so long
        # to have it back from a thread that renders or detokenises.
        sys.setswitchinterval(SWITCH_SECONDS)
        await self._runner.setup()
        # asyncio takes as many connections in one turn of its loop as it is told may wait.
        await web.SockSite(self._runner, sock, ssl_context=self._tls, backlog=ACCEPTED).start()
        sock.listen(BACKLOG)

    async def close(self) -> None:
        """Ends all connections and stops listening."""
        await self._runner.cleanup()


class WarmUp:
    """`Engine.start` in a thread of its own, so that the event loop goes on answering.

    A daemon thread: a compilation cannot be interrupted, and must not keep the process alive.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[None] = self._loop.create_future()
        threading.Thread(target=self._run, name="warm-up", daemon=True).start()

    @property
    def running(self) -> bool:
        """Whether the thread still compiles."""
        return not self._done.done()

    @property
    def done(self) -> asyncio.Future[None]:
        """Resolved when the engine is ready; holds the exception if it failed."""
        return self._done

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            self._engine.start()
        except BaseException as caught:  # whatever it was, the loop has to hear of it
            error = caught
        try:
            self._loop.call_soon_threadsafe(self._resolve, error)
        except RuntimeError:
            log.info("warm-up ended after the server")

    def _resolve(self, error: BaseException | None) -> None:
        if self._done.cancelled():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)


class StopSignal:
    """The first SIGTERM or SIGINT asks for an orderly end; the second ends the process at once."""

    def __init__(self) -> None:
        self.received = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._handle, number)

    def _handle(self, number: int) -> None:
        if self.received.is_set():
            log.warning("second signal: ending at once")
            logging.shutdown()
            os._exit(128 + number)
        log.info("%s: draining", signal.Signals(number).name)
        self.received.set()


async def serve(engine: Engine, sock: socket.socket, on_ready: Callable[[str], None]) -> int:
    """Serves until a signal, then drains; returns the process's exit code.

    Args:
        engine: an engine that has not been started.
        sock: a listening socket; it answers from now on, also while the engine warms up.
        on_ready: called with the URL once requests are taken.
    """
    stop = StopSignal()
    server = HttpServer(engine)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, server.service.access.reload)
    await server.start(sock)
    url = url_of(sock, "https" if engine.config.server.tls_cert else "http")
    log.info("listening on %s, warming up", url)
    warm_up = WarmUp(engine)
    stopped = asyncio.ensure_future(stop.received.wait())
    code = 0
    await asyncio.wait({warm_up.done, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if warm_up.done.done() and (error := warm_up.done.exception()) is not None:
        log.error("warm-up failed", exc_info=error)
        code = 1
    else:
        if warm_up.done.done():
            # What has been loaded stays: full garbage collections would walk all of it, for
            # longer than the event loop may stand still.
            gc.collect()
            gc.freeze()
            return_freed_memory()
            on_ready(url)
        await stopped
        code = await _drain(server, engine, warm_up)
    stopped.cancel()
    await server.close()
    if warm_up.running:
        # Interpreter shutdown under a compiling thread can crash; nothing is left to be saved.
        logging.shutdown()
        os._exit(code)
    return code


async def _drain(server: HttpServer, engine: Engine, warm_up: WarmUp) -> int:
    seconds = engine.config.server.drain_seconds
    if not await server.service.drain(seconds):
        log.warning("requests still run after %g seconds: ending them", seconds)
    if not warm_up.running:
        # Sequences that still run get an error event, which their handlers pass on.
        await asyncio.to_thread(engine.stop)
        await server.service.drain(SHUTDOWN_SECONDS)
    log.info("drained")
    return 0
