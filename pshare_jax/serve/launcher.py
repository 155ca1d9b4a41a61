"""`pshare serve --launcher=...`: frontends and workers as processes, on this machine or on Ray's.

The launcher starts processes, starts again what ends, tells frontends which workers there are, and
has more or fewer of these, as the load asks for and the configuration allows. It is on nobody's
way: when it dies, the processes go on with the workers that they were told of last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pshare_jax.cluster.cpus import cpu_sets
from pshare_jax.cluster.limits import check_cluster
from pshare_jax.cluster.secret import read_token
from pshare_jax.cluster.tls import cluster_tls
from pshare_jax.config import ServeConfig
from pshare_jax.core.autoscale import Split
from pshare_jax.errors import PshareError
from pshare_jax.serve import kubernetes
from pshare_jax.serve.frontend_client import FrontendClient, NoAnswerError, State
from pshare_jax.serve.local_host import LocalHost
from pshare_jax.serve.logs import say
from pshare_jax.serve.process import READY
from pshare_jax.serve.scaling import Scaling, check_autoscale
from pshare_jax.serve.supervision import BAD_CONFIG, Child, Host, Spec
from pshare_jax.serve.worker import READY as WORKER_READY

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Between two looks at what frontends know."""

LINK_SECONDS = 30.0
"""How long a rolling restart waits for frontends to be linked to who has just come."""

FIRST_SECONDS = 5.0
"""How long frontends wait for the addresses of all workers, once there is one of each side."""


class Launcher:
    """All processes of a cluster.

    Args:
        config: the serving configuration.
        args: the flags that it came from, which the processes get, too.
        host: where they run.
        token_file: of the secret that they know each other by.

    Raises:
        ConfigError: an address that cannot be had, a token, certificates or CPUs of no use.
    """

    def __init__(self, config: ServeConfig, args: Sequence[str], host: Host, token_file: str):
        tls = cluster_tls(config.cluster)
        self._tls = tls.client if tls else None
        self._config = config
        self._cpus = cpu_sets(config.cluster.cpus)
        self._host = host
        self._args = [*args, "--cluster.launcher=none", f"--cluster.token_file={token_file}"]
        self._client = FrontendClient(config.server, read_token(token_file))
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._announced = threading.Event()
        self._scaling = Scaling(config) if config.cluster.autoscale.is_on else None
        names = [f"prefill{i}" for i in range(config.prefill.engines)]
        names += [f"decode{i}" for i in range(config.decode.engines)]
        self.workers = [self._child(self._worker(name)) for name in names]
        self.frontends = [self._child(self._frontend(i)) for i in range(config.cluster.frontends)]
        self._threads = [threading.Thread(target=self._tell_all, name="members", daemon=True)]
        if self._scaling is not None:
            self._threads.append(
                threading.Thread(target=self._scale_all, name="scaling", daemon=True)
            )

    @property
    def children(self) -> list[Child]:
        """All processes."""
        return [*self.workers, *self.frontends]

    @property
    def urls(self) -> list[str]:
        """Of the frontends."""
        scheme = "https" if self._config.server.tls_cert else "http"
        return [f"{scheme}://{frontend.address}" for frontend in self.frontends]

    @property
    def failed(self) -> str:
        """Who of those that it began with would end again and again; empty if nobody."""
        if self._announced.is_set():
            return ""
        return ", ".join(child.name for child in self.children if child.gave_up.is_set())

    @property
    def is_ready(self) -> bool:
        """Whether everybody is."""
        return all(child.is_ready.is_set() for child in self.children)

    def announced(self) -> None:
        """All have been ready: from now on who fails is no reason to end."""
        self._announced.set()

    def members(self) -> list[str]:
        """Addresses of the workers; of one that was added later, once it has been ready."""
        first = not self._announced.is_set()
        return [w.address for w in self.workers if w.address and (first or w.was_ready)]

    def start(self) -> None:
        """Starts all of them; they become ready by and by."""
        for worker in self.workers:
            worker.start()
        for thread in self._threads:
            thread.start()

    def restart(self) -> None:
        """Replaces one of each side at a time; requests go on, or wait."""
        with self._lock:
            sides: dict[str, list[Child]] = {}
            for child in self.workers:
                sides.setdefault(child.spec.side, []).append(child)
            groups = [[c for c in group if c] for group in itertools.zip_longest(*sides.values())]
            for group in (*groups, *([frontend] for frontend in self.frontends)):
                if self._stopping.is_set():
                    return
                log.info("replacing %s", ", ".join(child.name for child in group))
                _at_once([child.restart for child in group])
                self._wait_until_linked()

    def scale(self, split: Split) -> None:
        """Has so many workers: those that are too many are drained first, then others are started;
        blocks until the former have gone."""
        with self._lock:
            if self._stopping.is_set():
                return
            leaving: list[Child] = []
            coming: list[str] = []
            for side in ("prefill", "decode"):
                here = [w for w in self.workers if w.spec.side == side]
                wanted = getattr(split, side)
                leaving += here[wanted:]
                free = (f"{side}{i}" for i in itertools.count())
                taken = {w.name for w in here[:wanted]}
                names = (name for name in free if name not in taken)
                coming += itertools.islice(names, max(0, wanted - len(here)))
            log.info(
                "%d prefill and %d decode workers: %s",
                split.prefill,
                split.decode,
                ", ".join([f"-{w.name}" for w in leaving] + [f"+{name}" for name in coming]),
            )
            _at_once([worker.stop for worker in leaving])
            self.workers = [w for w in self.workers if w not in leaving]
            for name in coming:
                self._add(name)

    def stop(self) -> None:
        """Ends all in good order: frontends first, since these need the workers."""
        self._stopping.set()
        for group in (self.frontends, self.workers):
            _at_once([child.stop for child in group])
        with self._lock:
            _at_once([worker.stop for worker in self.workers])
        self._host.close()

    def _add(self, name: str) -> None:
        worker = self._child(self._worker(name))
        self.workers = [*self.workers, worker]
        worker.start()

    def _child(self, spec: Spec) -> Child:
        return Child(spec, self._host, self._config.server.drain_seconds, self._tls)

    def _worker(self, name: str) -> Spec:
        role = name.rstrip("0123456789")
        command = (sys.executable, "-m", "pshare_jax.serve.worker", f"--role={role}")
        return Spec(
            name,
            (*command, f"--name={name}", *self._args),
            ("127.0.0.1", 0),
            WORKER_READY,
            watched=True,
            hosts=getattr(self._config, role).hosts,
            cpus=self._cpus_of(role, int(name.removeprefix(role))),
        )

    def _cpus_of(self, role: str, number: int) -> frozenset[int]:
        """One set after the other: prefill workers first, so that both sides are on all."""
        if not self._cpus:
            return frozenset()
        before = 0 if role == "prefill" else self._config.prefill.engines
        return self._cpus[(before + number) % len(self._cpus)]

    def _frontend(self, index: int) -> Spec:
        server = self._config.server
        cluster = self._config.cluster
        next_to = server.port and not (cluster.launcher == "ray" and cluster.ray.one_port)
        port = server.port + (index if next_to else 0)
        command = (sys.executable, "-m", "pshare_jax.serve", *self._args)
        return Spec(f"frontend{index}", command, (server.host, port), READY)

    def _tell_all(self) -> None:
        """Starts the frontends once there are workers, and keeps them informed of these."""
        self._wait_for_addresses()
        started = False
        while not self._stopping.is_set():
            members = self.members()
            flag = f"--cluster.workers={json.dumps(members)}"
            for frontend in self.frontends:
                frontend.spec = dataclasses.replace(frontend.spec, more=(flag,))
                if not started:
                    frontend.start()
                elif frontend.address:
                    self._tell(frontend, members)
            started = True
            self._drop_failed()
            self._stopping.wait(LOOK_SECONDS)

    def _wait_for_addresses(self) -> None:
        since = None
        while not self._stopping.wait(0.02):
            known = [worker for worker in self.workers if worker.address]
            if len(known) == len(self.workers):
                return
            if len({worker.spec.side for worker in known}) == 2:
                since = since or time.monotonic()
                if time.monotonic() - since > FIRST_SECONDS:
                    return

    def _tell(self, frontend: Child, members: Sequence[str]) -> None:
        """Has a frontend know the workers; one that does not answer is asked again later."""
        with contextlib.suppress(NoAnswerError):
            if set(self._client.state(frontend.address).workers) != set(members):
                self._client.tell(frontend.address, members)

    def _wait_until_linked(self) -> None:
        """Waits for a while until all frontends are linked to all workers."""
        end = time.monotonic() + LINK_SECONDS
        while time.monotonic() < end and not self._stopping.wait(0.1):
            with contextlib.suppress(NoAnswerError):
                known = [self._client.state(f.address).workers for f in self.frontends]
                members = set(self.members())
                if all(set(of) == members and not any(of.values()) for of in known):
                    return

    def _drop_failed(self) -> None:
        """Does without workers that were added and cannot run."""
        failed = [w for w in self.workers if w.gave_up.is_set() and not w.was_ready]
        # Who holds the lock changes the workers; there is time.
        if not failed or not self._announced.is_set() or not self._lock.acquire(blocking=False):
            return
        try:
            for worker in failed:
                log.error("%s cannot run: going on without it", worker.name)
                worker.stop()
            self.workers = [worker for worker in self.workers if worker not in failed]
        finally:
            self._lock.release()

    def _scale_all(self) -> None:
        assert self._scaling is not None
        self._announced.wait()
        while not self._stopping.wait(self._config.cluster.autoscale.observe_seconds):
            sides = Counter(worker.spec.side for worker in self.workers)
            self._scaling.have(Split(sides["prefill"], sides["decode"]))
            split = self._scaling.observe(
                time.monotonic(), [state and state.load for state in self._states()]
            )
            if split is not None:
                try:
                    self.scale(split)
                except (PshareError, OSError):
                    log.exception("there are not as many workers as there should be")

    def _states(self) -> Iterator[State | None]:
        for frontend in self.frontends:
            try:
                yield self._client.state(frontend.address)
            except NoAnswerError as error:
                log.warning("the load is not known: %s", error)
                yield None


def _at_once(actions: Sequence[Callable[[], None]]) -> None:
    """Does all of them, each in a thread, and waits for them."""
    threads = [threading.Thread(target=action) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def launch(config: ServeConfig, args: Sequence[str]) -> int:
    """Runs a cluster, or scales that of Kubernetes, until a signal; returns the exit code.

    SIGTERM and SIGINT end it in good order, as does SIGUSR1, however often that comes (see `tied`);
    SIGHUP replaces all processes, see `Launcher.restart`.

    Raises:
        ConfigError: a configuration that cannot be launched, an address that cannot be had, or a
            Ray that cannot be used.
        MissingExtraError: `ray` is not installed.
    """
    check_cluster(config)
    check_autoscale(config)
    if config.cluster.launcher == "kubernetes":
        return kubernetes.run(config)
    if config.cluster.launcher == "ray":
        from pshare_jax.serve.ray_host import ray_launcher

        return _run(ray_launcher(config, args), keep=config.cluster.ray.keep)
    with tempfile.TemporaryDirectory(prefix="pshare-") as name:
        token_file = make_token(Path(name))
        return _run(Launcher(config, args, LocalHost(config.server), token_file))


def make_token(folder: Path) -> str:
    """The file of a secret in a folder that only we can read; made anew if it is not there."""
    path = folder / "token"
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_urlsafe(32))
    return str(path)


def _run(launcher: Launcher, *, keep: bool = False) -> int:
    wanted: list[int] = []
    wakeup = threading.Event()

    def hear(number: int, _: object) -> None:
        is_second = any(n != signal.SIGHUP for n in wanted)
        if is_second and number not in (signal.SIGHUP, signal.SIGUSR1):
            os._exit(128 + number)
        wanted.append(number)
        wakeup.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, hear)
    launcher.start()
    announced = False
    code = 0
    while True:
        wakeup.wait(0.1)
        wakeup.clear()
        if any(number != signal.SIGHUP for number in wanted):
            break
        if failed := launcher.failed:
            log.error("%s cannot run: ending", failed)
            code = BAD_CONFIG
            break
        if not announced and launcher.is_ready:
            announced = True
            launcher.announced()
            for url in launcher.urls:
                say(f"{READY}{url}", sys.stdout)
        elif signal.SIGHUP in wanted:
            wanted.remove(signal.SIGHUP)
            threading.Thread(target=launcher.restart, daemon=True).start()
    if keep and not code:
        # What would be done in good order now would be done to processes that are to go on.
        log.info("leaving all processes to the next launcher")
        logging.shutdown()
        os._exit(0)
    launcher.stop()
    return code
