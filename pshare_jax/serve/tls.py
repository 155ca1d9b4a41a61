"""TLS from files; what is wrong with one is said by its name."""

from __future__ import annotations

import ssl
from pathlib import Path

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
    for name, path in (("tls_cert", cert), ("tls_key", key)):
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"server.{name}: {path}: {error.strerror}") from None
        wanted = b"CERTIFICATE-----" if name == "tls_cert" else b"PRIVATE KEY-----"
        if wanted not in text:
            what = "certificate" if name == "tls_cert" else "private key"
            raise ConfigError(f"server.{name}: {path}: holds no {what} in PEM form")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        # A password would be asked for on the terminal, of a server that has none.
        context.load_cert_chain(cert, key, password=lambda: _no_password(key))
    except (ssl.SSLError, OSError) as error:
        reason = getattr(error, "reason", None) or str(error)
        hint = {
            "KEY_VALUES_MISMATCH": f"is not the certificate of the key {key}",
            "PEM_LIB": f"cannot be read, or the key {key} cannot",
        }.get(reason, f"cannot be used with the key {key} ({reason})")
        raise ConfigError(f"server.tls_cert: {cert}: {hint}") from None
    return context


def _no_password(key: str) -> str:
    raise ConfigError(f"server.tls_key: {key}: is encrypted; give a key without a password")
