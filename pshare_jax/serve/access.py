"""Who asks: the middleware that knows API keys, what each may do, and how much.

A handler that changes the server is `admin_only`; every handler finds who asks in `request[KEY]`.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable

from aiohttp import web
from aiohttp.typedefs import Handler
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pshare_jax.config import ServerConfig
from pshare_jax.errors import ConfigError
from pshare_jax.serve.api_keys import ANONYMOUS, ApiKey, KeyRing, load_keys
from pshare_jax.serve.errors import ApiError
from pshare_jax.serve.quotas import Account

log = logging.getLogger(__name__)

KEY = web.RequestKey("key", ApiKey)
"""Who asks; `ANONYMOUS` where no keys are configured."""

PUBLIC_PATHS = web.AppKey("public_paths", frozenset[str])
"""What needs no key: it has no secrets, and probes have no keys."""

_METRICS_PATH = "/metrics"


class Access(Collector):
    """The keys of a server and their accounts, which are also metrics. Belongs to one event loop.

    Args:
        config: where keys are.
        clock: in seconds.

    Raises:
        ConfigError: keys that cannot be used.
    """

    def __init__(self, config: ServerConfig, clock: Callable[[], float] = time.monotonic):
        self._config = config
        self._clock = clock
        self._accounts: dict[str, Account] = {}
        self._anonymous = Account(ANONYMOUS, clock)
        self._take(load_keys(config))

    def find(self, token: bytes) -> ApiKey | None:
        """The key that `token` is, if it is one."""
        return self._ring.find(token)

    def account(self, key: ApiKey) -> Account:
        """What a key has used; of a key that has been removed meanwhile, a new one."""
        if not key.name:
            return self._anonymous
        return self._accounts.get(key.name) or Account(key, self._clock)

    def reload(self) -> None:
        """Reads the keys again; if that fails, the log says why, and the old ones stay."""
        try:
            keys = load_keys(self._config)
        except ConfigError as error:
            log.error("API keys were not read again: %s", error)
            return
        if not keys and self._ring.keys:
            log.error("API keys were not read again: there are none left, which would let all in")
            return
        self._take(keys)
        log.info("%d API keys", len(keys))

    @property
    def metrics_access(self) -> str:
        """Who may read `/metrics`: `public`, `key`, `admin`, or nobody (`off`)."""
        if self._config.metrics != "auto":
            return self._config.metrics
        return "admin" if self.has_tenants else "public"

    @property
    def has_tenants(self) -> bool:
        """Whether there are several keys, which should not learn of each other."""
        return len(self._ring.keys) > 1

    def collect(self) -> Iterable[Metric]:
        """Metrics by the name of the key; there are as many as keys are configured."""
        accounts = sorted(self._accounts.items())
        for name, text, value in _COUNTERS:
            family = CounterMetricFamily(name, text, labels=["key"])
            for key, account in accounts:
                family.add_metric([key], value(account))
            yield family
        refused = CounterMetricFamily(
            "pshare_key_refused", "Requests refused by a limit of the key.", labels=["key", "limit"]
        )
        running = GaugeMetricFamily(
            "pshare_key_running", "Requests at this moment.", labels=["key"]
        )
        for key, account in accounts:
            running.add_metric([key], account.running)
            for limit in ("requests", "tokens", "concurrent"):
                refused.add_metric([key, limit], account.refused[limit])
        yield refused
        yield running

    def _take(self, keys: Iterable[ApiKey]) -> None:
        self._ring = KeyRing(keys)
        accounts = {}
        for key in self._ring.keys:
            account = accounts[key.name] = self._accounts.get(key.name) or Account(key, self._clock)
            account.change(key)
        self._accounts = accounts


_COUNTERS: tuple[tuple[str, str, Callable[[Account], float]], ...] = (
    ("pshare_key_requests", "Requests of the key.", lambda account: account.requests),
    ("pshare_key_prompt_tokens", "Prompt tokens of the key.", lambda a: a.prompt_tokens),
    ("pshare_key_generation_tokens", "Generated tokens.", lambda a: a.generated_tokens),
)


ACCESS = web.AppKey("access", Access)


@web.middleware
async def authorize(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Finds out who asks.

    Raises:
        ApiError: 401 without a key that is known, 403 where an admin key is needed.
    """
    access, path = request.app[ACCESS], request.path.rstrip("/")
    needs = access.metrics_access if path == _METRICS_PATH else "key"
    if path in request.app[PUBLIC_PATHS] or needs in (
        "public",
        "off",
    ):  # off: there is nothing there
        return await handler(request)
    key = access.find(_token(request))
    if key is None:
        raise ApiError(
            401,
            "missing or wrong API key; send 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    request[KEY] = key
    if needs == "admin":
        _require_admin(key)
    return await handler(request)


@web.middleware
async def limit_requests(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Counts what costs something: requests with a body.

    Raises:
        ApiError: 429, the key has reached a limit.
    """
    key = request.get(KEY)
    if key is None or request.method != "POST":
        return await handler(request)
    with request.app[ACCESS].account(key).request():
        return await handler(request)


def admin_only(handler: Handler) -> Handler:
    """A handler that only admin keys may call; others get 403."""

    @functools.wraps(handler)
    async def checked(request: web.Request) -> web.StreamResponse:
        _require_admin(request[KEY])
        return await handler(request)

    return checked


def tells_of_all(handler: Handler) -> Handler:
    """A handler that tells of everybody's requests: of several keys only admin keys may call it."""

    @functools.wraps(handler)
    async def checked(request: web.Request) -> web.StreamResponse:
        if request.app[ACCESS].has_tenants:
            _require_admin(request[KEY])
        return await handler(request)

    return checked


def rate_headers(request: web.BaseRequest) -> dict[str, str]:
    """The `x-ratelimit` headers of a response."""
    key = request.get(KEY)
    if key is None or not isinstance(request, web.Request):
        return {}
    return request.app[ACCESS].account(key).headers()


def _token(request: web.Request) -> bytes:
    """The key that a request carries; empty without one. Headers may hold any bytes."""
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if "Authorization" not in request.headers and "x-api-key" in request.headers:
        scheme, given = "bearer", request.headers["x-api-key"]  # Anthropic's way
    if scheme.lower() != "bearer":
        return b""
    return given.strip().encode(errors="surrogateescape")


def _require_admin(key: ApiKey) -> None:
    if key.admin:
        return
    if not key.name:
        message = "this needs an admin key, and no keys are configured: see server.api_keys_file"
    else:
        message = f"key {key.name!r} is no admin key"
    raise ApiError(403, message, code="admin_key_required")
