"""TLS from files; what is wrong with one is said by its name."""

from __future__ import annotations

import ssl

from pshare_jax.cluster.tls import load_chain
from pshare_jax.config import ServerConfig
from pshare_jax.errors import ConfigError


def tls_context(config: ServerConfig) -> ssl.SSLContext | None:
    """The context of a server with the configured certificate; None without one.

    Raises:
        ConfigError: one of the two files is not named, cannot be read, is not what it should be, or
            does not belong to the other.
    """
    cert, key = config.tls_cert, config.tls_key
    if not cert and not key:
        return None
    if not cert or not key:
        missing, given = ("tls_key", "tls_cert") if cert else ("tls_cert", "tls_key")
        raise ConfigError(f"server.{missing} must be set too, since server.{given} is")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    load_chain(context, cert, key, "server")
    return context
