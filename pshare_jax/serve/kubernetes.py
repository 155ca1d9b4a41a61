"""`--launcher=kubernetes`: carries out `cluster.autoscale` on what Kubernetes runs.

It asks frontends for the load, and tells Kubernetes how many workers of each side there should be.
Kubernetes starts and drains them; frontends find them by the name that stands for all. When this
process or the API is away, everything goes on as it is.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import signal
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pshare_jax.cluster.discovery import Discovery, check_workers
from pshare_jax.cluster.secret import read_token
from pshare_jax.config import ServeConfig
from pshare_jax.core.autoscale import Split
from pshare_jax.errors import ConfigError, PshareError
from pshare_jax.serve.frontend_client import FrontendClient, NoAnswerError, State
from pshare_jax.serve.scaling import Scaling, check_autoscale

log = logging.getLogger(__name__)

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where Kubernetes puts a pod's token, namespace and the CA of its API."""

GROUPS = {"statefulsets": "apps/v1", "leaderworkersets": "leaderworkerset.x-k8s.io/v1"}
"""Of what can be scaled: the API's group and version."""

SECONDS = 10.0
"""That the API may take to answer."""


class ApiError(PshareError):
    """The API of Kubernetes does not do what it was asked for; says why."""


class Scales:
    """The sizes of a namespace's objects. Methods block.

    Args:
        account: folder of the token, the namespace and the CA.
        environment: says where the API is.

    Raises:
        ConfigError: this is no pod of Kubernetes, or has no token.
    """

    def __init__(self, account: Path = ACCOUNT, environment: Mapping[str, str] = os.environ):
        try:
            self._host = environment["KUBERNETES_SERVICE_HOST"]
            self._port = int(environment["KUBERNETES_SERVICE_PORT"])
            self._namespace = (account / "namespace").read_text().strip()
            self._tls = ssl.create_default_context(cafile=account / "ca.crt")
        except (KeyError, ValueError, OSError) as error:
            raise ConfigError(
                f"cluster.launcher: `kubernetes` runs in a pod with a service account: {error}"
            ) from error
        self._account = account

    def size(self, what: str) -> int:
        """How many there are to be.

        Args:
            what: such as `statefulsets/pshare-decode`.

        Raises:
            ApiError: it cannot be known.
        """
        return self._ask("GET", what)

    def resize(self, what: str, count: int) -> None:
        """How many there are to be from now on.

        Raises:
            ApiError: it was not changed.
        """
        self._ask("PATCH", what, {"spec": {"replicas": count}})

    def _ask(self, method: str, what: str, change: object = None) -> int:
        kind, _, name = what.partition("/")
        path = f"/apis/{GROUPS[kind]}/namespaces/{self._namespace}/{kind}/{name}/scale"
        connection = http.client.HTTPSConnection(
            self._host, self._port, timeout=SECONDS, context=self._tls
        )
        try:
            # It is another one every hour.
            token = (self._account / "token").read_text().strip()
            headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
            body = None
            if change is not None:
                headers["Content-Type"] = "application/merge-patch+json"
                body = json.dumps(change)
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 200:
                shown = text[:300].decode(errors="replace")
                raise ApiError(f"{method} {path}: {answer.status}: {shown}")
            return int(json.loads(text)["spec"].get("replicas", 0))
        except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
            raise ApiError(f"{method} {path}: {error or type(error).__name__}") from error
        finally:
            connection.close()


class Scaler:
    """Looks at the load, and changes how many workers there are.

    Args:
        config: the serving configuration.
        scales: of the namespace.
        state: asks a frontend, by its address.
        frontends: gives the addresses of all.
    """

    def __init__(
        self,
        config: ServeConfig,
        scales: Scales,
        state: Callable[[str], State],
        frontends: Callable[[], Sequence[str]],
    ):
        self._sides = {
            "prefill": config.cluster.kubernetes.prefill,
            "decode": config.cluster.kubernetes.decode,
        }
        self._scales = scales
        self._state = state
        self._frontends = frontends
        self._scaling = Scaling(config)

    def turn(self, now: float) -> None:
        """Looks once, and changes what is to be changed.

        Args:
            now: seconds, from any start.

        Raises:
            ApiError, NoAnswerError: nothing is decided, since something is not known.
        """
        sizes = {side: self._scales.size(what) for side, what in self._sides.items()}
        self._scaling.have(Split(sizes["prefill"], sizes["decode"]))
        addresses = self._frontends()
        split = self._scaling.observe(now, [self._state(a).load for a in addresses])
        if split is None:
            return
        wanted = {"prefill": split.prefill, "decode": split.decode}
        log.info("%d prefill and %d decode workers", split.prefill, split.decode)
        # Who is to go first, so that devices are there for who is to come.
        for side in sorted(wanted, key=lambda side: wanted[side] - sizes[side]):
            if wanted[side] != sizes[side]:
                self._scales.resize(self._sides[side], wanted[side])


def check_kubernetes(config: ServeConfig) -> None:
    """Checks what is said of Kubernetes.

    Raises:
        ConfigError: names the key.
    """
    if not config.cluster.autoscale.is_on:
        raise ConfigError(
            "cluster.launcher: `kubernetes` has as many workers as are needed: set "
            "cluster.autoscale.max_prefill and max_decode, or devices"
        )
    if not config.cluster.token_file:
        raise ConfigError("cluster.token_file: frontends tell nobody of their load without it")
    for side in ("prefill", "decode"):
        what = getattr(config.cluster.kubernetes, side)
        kind, _, name = what.partition("/")
        if kind not in GROUPS or not name or not name.replace("-", "").isalnum():
            raise ConfigError(
                f"cluster.kubernetes.{side}: {what!r} must be {' or '.join(GROUPS)}/NAME"
            )
    check_workers(config.cluster.kubernetes.frontends.split(","))


def run(config: ServeConfig) -> int:
    """Scales until a signal; returns the exit code.

    Raises:
        ConfigError: it cannot be done as it is configured, or not here.
    """
    check_autoscale(config)
    check_kubernetes(config)
    client = FrontendClient(config.server, read_token(config.cluster.token_file))
    discovery = Discovery(config.cluster.kubernetes.frontends.split(","))
    stopping = threading.Event()

    def stop(number: int, frame: object) -> None:
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)

    def frontends() -> list[str]:
        return asyncio.run(discovery.look(()))

    scaler = Scaler(config, Scales(), client.state, frontends)
    while not stopping.wait(config.cluster.autoscale.observe_seconds):
        try:
            scaler.turn(time.monotonic())
        except (ApiError, NoAnswerError) as error:
            log.warning("the number of workers stays as it is: %s", error)
    return 0
