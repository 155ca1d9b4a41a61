"""HTTPS from files, and what is said of files that cannot be used."""

import http.client
import ssl
import subprocess

import pytest

from pshare_jax.errors import ConfigError
from pshare_jax.serve.lifecycle import bind, url_of
from pshare_jax.serve.tls import tls_context
from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import running_server


def make(folder, name: str, *options: str) -> tuple[str, str]:
    """A certificate for 127.0.0.1 and its key."""
    cert, key = str(folder / f"{name}.crt"), str(folder / f"{name}.key")
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    outputs = ["-keyout", key, "-out", cert, "-days", "2"]
    subprocess.run(
        [*command, *subject, *outputs, *(options or ("-nodes",))], check=True, capture_output=True
    )
    return cert, key


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    (folder / "text").write_text("nothing of use")
    return {
        "one": make(folder, "one"),
        "other": make(folder, "other"),
        "locked": make(folder, "locked", "-passout", "pass:secret"),
        "text": str(folder / "text"),
        "none": str(folder / "none"),
    }


def test_https(tokenizer, files):
    cert, key = files["one"]
    config = fake_config(tls_cert=cert, tls_key=key)
    with running_server(fake_engine(tokenizer, config)) as client:
        trusting = ssl.create_default_context(cafile=cert)
        connection = http.client.HTTPSConnection("127.0.0.1", client.port, context=trusting)
        connection.request("GET", "/ready")
        assert connection.getresponse().status == 200
        connection.close()
        # Plain HTTP is no way in, and does not hurt.
        with client.raw(b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n") as sock:
            assert sock.recv(100)[:4] != b"HTTP"
        connection = http.client.HTTPSConnection("127.0.0.1", client.port, context=trusting)
        connection.request("GET", "/ready")
        assert connection.getresponse().status == 200
        connection.close()


def test_the_url_says_https():
    with bind(fake_config().server) as sock:
        assert url_of(sock, "https").startswith("https://127.0.0.1:")


@pytest.mark.parametrize(
    ("cert", "key", "message"),
    [
        ("one", None, "server.tls_key must be set too, since server.tls_cert is"),
        (None, "one", "server.tls_cert must be set too, since server.tls_key is"),
        ("none", "one", "server.tls_cert: {none}: No such file or directory"),
        ("one", "none", "server.tls_key: {none}: No such file or directory"),
        ("text", "one", "server.tls_cert: {text}: holds no certificate in PEM form"),
        ("one", "text", "server.tls_key: {text}: holds no private key in PEM form"),
        ("other", "one", "server.tls_cert: {other[0]}: is not the certificate of the key {one[1]}"),
        ("locked", "locked", "server.tls_key: {locked[1]}: is encrypted; give a key without a"),
    ],
)
def test_files_that_cannot_be_used(files, cert, key, message):
    def path(name: str | None, index: int) -> str:
        found = files[name] if name else ""
        return found if isinstance(found, str) else found[index]

    config = fake_config(tls_cert=path(cert, 0), tls_key=path(key, 1)).server
    for use in (tls_context, bind):
        with pytest.raises(ConfigError) as caught:
            use(config)
        assert str(caught.value).startswith(message.format(**files))
