"""HTTP as clients and proxies really speak it: every fault is a 4xx in JSON."""

import gzip
import json
import zlib

import pytest

from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import Client, running_server

COMPLETIONS = "/v1/completions"
BODY = json.dumps({"model": "planner", "prompt": "x"}).encode()
JSON = "Content-Type: application/json\r\n"
# Without the time, which would be in the names of tests, and differ between their processes.
PACKED = gzip.compress(BODY, mtime=0)


@pytest.fixture(scope="module")
def server(tokenizer):
    config = fake_config(max_body_bytes=100_000, cors_origins=["https://app.example"])
    with running_server(fake_engine(tokenizer, config)) as client:
        yield client


def exchange(client: Client, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the first answer to raw bytes, whose connection then closes."""
    with client.raw(data) as sock:
        received = b""
        while chunk := sock.recv(65536):
            received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), dict(line.split(": ", 1) for line in lines), body


def packed(server: Client, encoding: str, data: bytes):
    return server.post(COMPLETIONS, data, **{"Content-Encoding": encoding})


class TestContentEncoding:
    @pytest.mark.parametrize(
        ("encoding", "data"),
        [
            ("gzip", PACKED),
            ("x-gzip", PACKED),
            ("GZIP", PACKED),
            ("identity", BODY),
            ("deflate", zlib.compress(BODY)),
            ("deflate", zlib.compress(BODY)[2:-4]),
        ],
    )
    def test_what_is_read(self, server, encoding, data):
        assert packed(server, encoding, data).json["choices"][0]["text"] == "hello world"

    @pytest.mark.parametrize(
        ("encoding", "data"),
        [
            ("gzip", BODY),
            ("gzip", b""),
            ("gzip", PACKED[:-4]),
            ("gzip", PACKED[:-8] + b"\0\0\0\0" + PACKED[-4:]),
            ("gzip", PACKED + b"more"),
            ("gzip", PACKED[:12] + b"\xff" + PACKED[13:]),
            ("deflate", BODY),
            ("deflate", zlib.compress(BODY)[:-1]),
            ("deflate", zlib.compress(BODY) + b"\0"),
        ],
    )
    def test_what_is_not_so_encoded(self, server, encoding, data):
        answer = packed(server, encoding, data)
        assert answer.status == 400
        assert answer.error["code"] == "invalid_content_encoding"

    @pytest.mark.parametrize("encoding", ["zstd", "br", "foo", "gzip, gzip"])
    def test_what_is_not_known(self, server, encoding):
        answer = packed(server, encoding, BODY)
        assert answer.status == 415
        assert answer.error["code"] == "unsupported_content_encoding"
        assert answer.headers["Accept-Encoding"] == "gzip, deflate"

    def test_a_bomb_is_cut_off_at_the_limit(self, server):
        answer = packed(server, "gzip", gzip.compress(b" " * 50_000_000))
        assert answer.status == 413
        assert answer.error["code"] == "body_too_large"


def chunked(server: Client, chunks: bytes) -> tuple[int, dict[str, str], bytes]:
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\n{JSON}Transfer-Encoding: chunked\r\n\r\n"
    return exchange(server, head.encode() + chunks)


@pytest.mark.parametrize("chunks", [b"zz\r\nx\r\n", b"5\r\nabcdefgh\r\n0\r\n\r\n", b"-1\r\n\r\n"])
def test_broken_chunks(server, caplog, chunks):
    status, headers, body = chunked(server, chunks)
    assert status == 400
    assert headers["Content-Type"].startswith("application/json")
    assert json.loads(body)["error"]["code"] == "invalid_http"
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    ("head", "status", "code"),
    [
        (f"Cookie: {'x' * 9000}\r\n", 431, "headers_too_large"),
        (f"{'x' * 9000}: 1\r\n", 431, "headers_too_large"),
        ("".join(f"X-{i}: 1\r\n" for i in range(200)), 431, "headers_too_large"),
        ("no colon\r\n", 400, "invalid_http"),
        ("Content-Length: 5\r\nContent-Length: 6\r\n", 400, "invalid_http"),
        ("Content-Length: -1\r\n", 400, "invalid_http"),
        ("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", 400, "invalid_http"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_errors_before_routing_have_openais_shape(server, caplog, head, status, code):
    data = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\n{JSON}{head}\r\n".encode()
    got, headers, body = exchange(server, data)
    assert got == status
    assert headers["Content-Type"].startswith("application/json")
    assert headers["X-Request-Id"].startswith("req-")
    error = json.loads(body)["error"]
    assert (error["code"], error["type"]) == (code, "invalid_request_error")
    assert "x" * 100 not in error["message"]
    assert "Traceback" not in caplog.text
    assert server.complete().status == 200


def test_a_request_line_that_is_too_long(server):
    status, _, body = exchange(server, b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    assert status == 431
    assert json.loads(body)["error"]["code"] == "headers_too_large"


class TestExpect:
    def head(self, length: int, expect: str = "100-continue") -> bytes:
        return (
            f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\n{JSON}Content-Length: {length}\r\n"
            f"Expect: {expect}\r\n\r\n"
        ).encode()

    def test_a_body_that_is_wanted_is_invited(self, server):
        with server.raw(self.head(len(BODY))) as sock:
            assert sock.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
            sock.sendall(BODY)
            assert sock.recv(4096).startswith(b"HTTP/1.1 200 OK")

    def test_a_body_that_is_too_large_is_not(self, server):
        with server.raw(self.head(1_000_000)) as sock:
            assert sock.recv(4096).startswith(b"HTTP/1.1 413 ")

    def test_another_expectation(self, server):
        with server.raw(self.head(len(BODY), "200-ok")) as sock:
            assert sock.recv(4096).startswith(b"HTTP/1.1 417 ")


class TestRequestId:
    @pytest.mark.parametrize("stream", [False, True])
    def test_it_is_echoed(self, server, stream):
        body = json.dumps({"model": "planner", "prompt": "x", "stream": stream}).encode()
        assert server.post(COMPLETIONS, body, **{"X-Request-Id": "abc"}).headers[
            "X-Request-Id"
        ] == ("abc")

    @pytest.mark.parametrize(
        ("path", "body", "status"),
        [
            (COMPLETIONS, b"{", 400),
            (COMPLETIONS, b'{"model": "nobody", "prompt": "x"}', 404),
            ("/nowhere", b"{}", 404),
            ("/health", b"{}", 405),
        ],
    )
    def test_on_errors_too(self, server, path, body, status):
        answer = server.post(path, body, **{"X-Request-Id": "abc"})
        assert (answer.status, answer.headers["X-Request-Id"]) == (status, "abc")

    @pytest.mark.parametrize("given", ["", "a b", "x" * 129, "é", "a\tb"])
    def test_one_that_is_no_token_is_replaced(self, server, given):
        answer = server.get("/health", **{"X-Request-Id": given})
        assert answer.headers["X-Request-Id"].startswith("req-")

    def test_without_one_it_is_the_answers(self, server):
        answer = server.complete()
        assert answer.headers["X-Request-Id"] == answer.json["id"]


@pytest.mark.parametrize("path", ["/v1/completions/", "/v1/chat/completions/", "/tokenize/"])
def test_a_trailing_slash_does_not_matter_to_post(server, path):
    prompt = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    assert server.post(path, {"model": "planner", **prompt}).status == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/team/critic", "/health", "/metrics"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("slash", ["", "/"])
def test_a_trailing_slash_and_head(server, path, method, slash):
    answer = server.request(method, path + slash)
    assert answer.status == 200
    assert bool(answer.body) == (method == "GET")
    assert int(answer.headers["Content-Length"]) > 0


@pytest.mark.parametrize("path", ["team/critic", "team%2Fcritic", "team%2fcritic", "%74eam/critic"])
def test_a_percent_encoded_model(server, path):
    assert server.get(f"/v1/models/{path}").json["id"] == "team/critic"


def test_a_byte_order_mark_is_skipped(server):
    assert server.post(COMPLETIONS, b"\xef\xbb\xbf" + BODY).status == 200


class TestCors:
    def test_a_preflight_needs_no_key(self, tokenizer):
        config = fake_config(api_key="secret", cors_origins=["https://app.example"])
        headers = {
            "Origin": "https://app.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type",
        }
        with running_server(fake_engine(tokenizer, config)) as client:
            answer = client.request("OPTIONS", "/v1/chat/completions", headers=headers)
            assert client.request("OPTIONS", "/v1/chat/completions").status == 401
        assert answer.status == 204
        assert answer.headers["Access-Control-Allow-Origin"] == "https://app.example"
        assert answer.headers["Access-Control-Allow-Headers"] == "authorization, content-type"
        assert "POST" in answer.headers["Access-Control-Allow-Methods"]
        assert answer.headers["Vary"] == "Origin"

    @pytest.mark.parametrize("asked", ["x-\xff", "a b", "", "x: y", "ü"])
    def test_a_preflight_that_names_no_headers_gets_none(self, server, asked):
        headers = {
            "Origin": "https://app.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": asked,
        }
        answer = server.request("OPTIONS", "/v1/chat/completions", headers=headers)
        assert answer.status == 204
        assert "Access-Control-Allow-Headers" not in answer.headers

    @pytest.mark.parametrize("path", ["/v1/models", "/nowhere"])
    def test_answers_and_errors_may_be_read(self, server, path):
        answer = server.get(path, Origin="https://app.example")
        assert answer.headers["Access-Control-Allow-Origin"] == "https://app.example"
        assert "X-Request-Id" in answer.headers["Access-Control-Expose-Headers"]

    def test_another_origin_may_not(self, server):
        answer = server.get("/v1/models", Origin="https://evil.example")
        assert answer.status == 200
        assert "Access-Control-Allow-Origin" not in answer.headers

    def test_every_origin(self, tokenizer):
        with running_server(fake_engine(tokenizer, fake_config(cors_origins=["*"]))) as client:
            stream = client.request(
                "POST",
                COMPLETIONS,
                b'{"model": "planner", "prompt": "x", "stream": true}',
                {"Content-Type": "application/json", "Origin": "null"},
            )
            assert stream.headers["Access-Control-Allow-Origin"] == "*"

    def test_without_configuration_there_is_none(self, client):
        answer = client.request(
            "OPTIONS",
            COMPLETIONS,
            headers={"Origin": "https://app.example", "Access-Control-Request-Method": "POST"},
        )
        assert answer.status == 405
        assert "Access-Control-Allow-Origin" not in answer.headers


class TestWhatStrangersLearn:
    NOTHING = (
        b"NONSENSE\r\n\r\n",
        b"GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    )

    @pytest.mark.parametrize("data", NOTHING)
    def test_not_what_the_server_is_made_of(self, server, data):
        _, headers, _ = exchange(server, data)
        assert "Server" not in headers

    @pytest.mark.parametrize("data", NOTHING)
    def test_the_header_is_a_setting(self, tokenizer, data):
        with running_server(fake_engine(tokenizer, fake_config(server_header="x/1"))) as client:
            _, headers, _ = exchange(client, data)
        assert headers["Server"] == "x/1"

    @pytest.mark.parametrize(
        ("metrics", "without", "with_key"),
        [("public", 200, 200), ("key", 401, 200), ("off", 404, 404)],
    )
    @pytest.mark.parametrize("path", ["/metrics", "/metrics/"])
    def test_metrics_are_a_setting(self, tokenizer, metrics, without, with_key, path):
        config = fake_config(metrics=metrics, api_key="k")
        with running_server(fake_engine(tokenizer, config)) as client:
            assert client.get(path).status == without
            assert client.get(path, Authorization="Bearer k").status == with_key
