"""API keys: who may ask, how much, and with whom a cache is shared.

Keys are kept as SHA-256 digests. A file is YAML or JSON, `{keys: [{name: ..., key: ...}, ...]}`,
and so is the text of the environment variable `PSHARE_API_KEYS`.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
import yaml

from pshare_jax.config import ServerConfig
from pshare_jax.errors import ConfigError

log = logging.getLogger(__name__)

KEYS_VARIABLE = "PSHARE_API_KEYS"
KEY_VARIABLE = "PSHARE_API_KEY"

SINGLE_NAME = "default"
"""Name of the key that is configured without one."""

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SHARED = "shared"
_MAX_KEYS = 1000


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """A key as files spell it; limits that are absent do not exist."""

    name: str
    key: str | None = None
    sha256: str | None = None
    weight: float = 1.0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    admin: bool = False
    shared_cache: bool = False
    cache_group: str | None = None


class _Entries(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[_Entry]


class ApiKey(msgspec.Struct, frozen=True):
    """Who asks.

    Args:
        name: shown in logs and metrics; empty where no keys are configured.
        digest: SHA-256 of the key.
        tenant: names the cache; only keys of one tenant find each other's prompts in it.
        weight: share of the engine, relative to other keys that want something.
        requests_per_minute: None is no limit, here and below.
        tokens_per_minute: prompt tokens and generated ones.
        max_concurrent: requests at once.
        admin: whether it may change the server.
    """

    name: str
    digest: bytes = b""
    tenant: str = ""
    weight: float = 1.0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    admin: bool = False

    def cache_salt(self, client_salt: str) -> str:
        """The salt of a request: the tenant's and the client's own, which cannot imitate another.

        Without tenants it is the client's own.
        """
        if not self.tenant:
            return client_salt
        return f"{len(self.tenant)}:{self.tenant}:{client_salt}"


ANONYMOUS = ApiKey("")
"""Who asks where no keys are configured."""


class KeyRing:
    """The keys that are accepted; with none, everybody is `ANONYMOUS`."""

    def __init__(self, keys: Iterable[ApiKey]):
        self.keys = tuple(keys)

    def find(self, token: bytes) -> ApiKey | None:
        """The key that `token` is; takes the same time whichever it is and however far it fits."""
        if not self.keys:
            return ANONYMOUS
        digest = hashlib.sha256(token).digest()
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def load_keys(config: ServerConfig, environ: Mapping[str, str] = os.environ) -> list[ApiKey]:
    """All keys of the configuration: `api_key`, `api_keys_file`, and those of the environment.

    Raises:
        ConfigError: a file that cannot be read, or a key that cannot be used; by source and name.
    """
    keys: list[ApiKey] = []
    for source, text in [
        ("server.api_key", config.api_key),
        (KEY_VARIABLE, environ.get(KEY_VARIABLE, "")),
    ]:
        if text:
            keys.append(_key(_Entry(SINGLE_NAME, key=text), source))
    if config.api_keys_file:
        path = Path(config.api_keys_file).expanduser()
        keys += _parse(_read(path), f"server.api_keys_file: {path}")
    if text := environ.get(KEYS_VARIABLE, ""):
        keys += _parse(text, KEYS_VARIABLE)
    if len(keys) > _MAX_KEYS:
        raise ConfigError(f"{len(keys)} API keys are configured; at most {_MAX_KEYS} can be")
    _check_distinct(keys)
    return keys


def _read(path: Path) -> str:
    try:
        if path.stat().st_mode & 0o077:
            log.warning("%s can be read by other users; chmod 600 keeps its keys secret", path)
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"server.api_keys_file: cannot read {path}: {error}") from error


def _parse(text: str, source: str) -> list[ApiKey]:
    try:
        entries = msgspec.convert(yaml.safe_load(text), _Entries).keys
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {error}; expected 'keys:' and a list of keys") from error
    except (yaml.YAMLError, RecursionError) as error:
        # The text holds keys: where it is wrong may be said, not what stands there.
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" at line {mark.line + 1}"
        raise ConfigError(f"{source}: neither YAML nor JSON{where}") from None
    return [_key(entry, source) for entry in entries]


def _key(entry: _Entry, source: str) -> ApiKey:
    if not _NAME.fullmatch(entry.name):
        raise ConfigError(
            f"{source}: the name {entry.name[:80]!r} is not 1 to 64 of A-Z a-z 0-9 _ . -"
        )
    at = f"{source}: key {entry.name!r}"
    for field in ("requests_per_minute", "tokens_per_minute", "max_concurrent"):
        value = getattr(entry, field)
        if value is not None and value < 1:
            raise ConfigError(
                f"{at}: {field} must be at least 1, is {value}; leave it out for none"
            )
    if not (math.isfinite(entry.weight) and 1e-3 <= entry.weight <= 1e3):
        raise ConfigError(f"{at}: weight must be 0.001 .. 1000, is {entry.weight}")
    if entry.shared_cache and entry.cache_group is not None:
        raise ConfigError(f"{at}: give either shared_cache or cache_group")
    group = _SHARED if entry.shared_cache else entry.cache_group
    if group is not None and not _NAME.fullmatch(group):
        raise ConfigError(f"{at}: cache_group is not 1 to 64 of A-Z a-z 0-9 _ . -")
    return ApiKey(
        name=entry.name,
        digest=_digest(entry, at),
        tenant=f"key/{entry.name}" if group is None else f"group/{group}",
        weight=entry.weight,
        requests_per_minute=entry.requests_per_minute,
        tokens_per_minute=entry.tokens_per_minute,
        max_concurrent=entry.max_concurrent,
        admin=entry.admin,
    )


def _digest(entry: _Entry, at: str) -> bytes:
    if (entry.key is None) == (entry.sha256 is None):
        raise ConfigError(f"{at}: give either key or sha256")
    if entry.sha256 is not None:
        if not _DIGEST.fullmatch(entry.sha256.lower()):
            raise ConfigError(f"{at}: sha256 must be 64 hexadecimal digits")
        return bytes.fromhex(entry.sha256)
    assert entry.key is not None
    if not entry.key or entry.key != entry.key.strip() or "\n" in entry.key:
        raise ConfigError(f"{at}: a key is one line, not empty, without blanks around it")
    return hashlib.sha256(entry.key.encode(errors="surrogateescape")).digest()


def _check_distinct(keys: Iterable[ApiKey]) -> None:
    names: set[str] = set()
    owners: dict[bytes, str] = {}
    for key in keys:
        if key.name in names:
            raise ConfigError(f"two API keys have the name {key.name!r}")
        if key.digest in owners:
            raise ConfigError(f"API keys {owners[key.digest]!r} and {key.name!r} are the same")
        names.add(key.name)
        owners[key.digest] = key.name
