"""TLS between the processes of a cluster: each shows a certificate, and believes those of one CA.

The CA is the cluster's own: whoever has a certificate of it is one of its processes, wherever it
runs. So names in certificates are not compared with addresses, which change.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from pshare_jax.config import ClusterConfig
from pshare_jax.errors import ConfigError


@dataclass(frozen=True)
class ClusterTls:
    """What a process shows and believes, when it is connected to and when it connects."""

    server: ssl.SSLContext
    client: ssl.SSLContext


def cluster_tls(config: ClusterConfig) -> ClusterTls | None:
    """The contexts of a process with the configured certificate; None without one.

    Raises:
        ConfigError: one of the three files is not named, cannot be read, is not what it should be,
            or the key is not that of the certificate.
    """
    files = {name: getattr(config, name) for name in ("tls_cert", "tls_key", "tls_ca")}
    given = [name for name, path in files.items() if path]
    if not given:
        return None
    for name, path in files.items():
        if not path:
            raise ConfigError(f"cluster.{name} must be set too, since cluster.{given[0]} is")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # Who shows none gets no further than health and metrics, see `serve.worker_app`.
    server.verify_mode = ssl.CERT_OPTIONAL
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    for context in (server, client):
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        load_chain(context, config.tls_cert, config.tls_key, "cluster")
        try:
            context.load_verify_locations(config.tls_ca)
        except (ssl.SSLError, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"cluster.tls_ca: {config.tls_ca}: {reason}") from None
    return ClusterTls(server, client)


def load_chain(context: ssl.SSLContext, cert: str, key: str, section: str) -> None:
    """Loads a certificate and its key from PEM files.

    Args:
        context: that is to show them.
        cert: file of the certificate and those above it.
        key: file of its private key, without a password.
        section: of the configuration that names them, for errors.

    Raises:
        ConfigError: a file cannot be read, is not what it should be, or does not belong to the
            other.
    """
    for name, path in (("tls_cert", cert), ("tls_key", key)):
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"{section}.{name}: {path}: {error.strerror}") from None
        wanted = b"CERTIFICATE-----" if name == "tls_cert" else b"PRIVATE KEY-----"
        if wanted not in text:
            what = "certificate" if name == "tls_cert" else "private key"
            raise ConfigError(f"{section}.{name}: {path}: holds no {what} in PEM form")

    def no_password() -> str:
        raise ConfigError(f"{section}.tls_key: {key}: is encrypted; give a key without a password")

    try:
        # A password would be asked for on the terminal, of a server that has none.
        context.load_cert_chain(cert, key, password=no_password)
    except (ssl.SSLError, OSError) as error:
        reason = getattr(error, "reason", None) or str(error)
        hint = {
            "KEY_VALUES_MISMATCH": f"is not the certificate of the key {key}",
            "PEM_LIB": f"cannot be read, or the key {key} cannot",
        }.get(reason, f"cannot be used with the key {key} ({reason})")
        raise ConfigError(f"{section}.tls_cert: {cert}: {hint}") from None
