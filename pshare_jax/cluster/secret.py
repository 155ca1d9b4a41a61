"""The secret by which the processes of a cluster know each other."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path

from pshare_jax.errors import ConfigError

MIN_CHARS = 16


def read_token(file: str) -> str:
    """The token in a file, without the white space around it; empty if there is no file.

    Raises:
        ConfigError: it cannot be read, or is too short to be a secret.
    """
    if not file:
        return ""
    try:
        token = Path(file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cluster.token_file: {file}: {error}") from error
    if len(token) < MIN_CHARS or not token.isascii() or not token.isprintable():
        raise ConfigError(
            f"cluster.token_file: {file} must hold at least {MIN_CHARS} printable ASCII characters"
        )
    return token


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`, `[IPV6]:PORT` too.

    Raises:
        ConfigError: it is none.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{address!r} is no address: write HOST:PORT")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"{host}: {error}") from error
    return all(ipaddress.ip_address(address[4][0]).is_loopback for address in found)
