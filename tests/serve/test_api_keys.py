"""Keys from files and the environment, what each may do, and what one learns of another."""

import hashlib
import json

import pytest
from aiohttp.test_utils import make_mocked_request

from pshare_jax.config import ServerConfig
from pshare_jax.errors import ConfigError
from pshare_jax.serve.__main__ import main
from pshare_jax.serve.access import KEY, Access, admin_only
from pshare_jax.serve.api_keys import ANONYMOUS, ApiKey, KeyRing, load_keys
from pshare_jax.serve.errors import ApiError
from pshare_jax.serve.quotas import Account, Bucket
from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import eventually, running_server

KEYS = """
keys:
  - {name: alice, key: key-of-alice, weight: 3}
  - {name: bob, key: key-of-bob, requests_per_minute: 3, tokens_per_minute: 60, max_concurrent: 1}
  - {name: carol, key: key-of-carol, shared_cache: true}
  - {name: dave, key: key-of-dave, shared_cache: true}
  - {name: ops, key: key-of-ops, admin: true}
"""
MODEL = {"model": "planner", "prompt": "hello there, this is a prompt", "max_tokens": 4}


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer key-of-{name}"}


@pytest.fixture
def keys_file(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text(KEYS)
    path.chmod(0o600)
    return path


@pytest.fixture
def server(tokenizer, keys_file):
    config = fake_config(api_keys_file=str(keys_file))
    with running_server(fake_engine(tokenizer, config)) as client:
        yield client


def complete(server, name: str, **fields):
    return server.post("/v1/completions", {**MODEL, **fields}, **bearer(name))


class TestFiles:
    def load(self, text: str) -> list[ApiKey]:
        return load_keys(ServerConfig(), {"PSHARE_API_KEYS": text})

    def test_keys_are_kept_as_digests(self):
        digest = hashlib.sha256(b"secret").hexdigest()
        [plain] = self.load("keys: [{name: a, key: secret}]")
        [hashed] = self.load(json.dumps({"keys": [{"name": "a", "sha256": digest.upper()}]}))
        assert plain == hashed == ApiKey("a", bytes.fromhex(digest), "key/a")
        assert "secret" not in repr(plain)

    def test_all_sources_together(self, keys_file):
        config = ServerConfig(api_keys_file=str(keys_file))
        keys = load_keys(config, {"PSHARE_API_KEY": "x", "PSHARE_API_KEYS": "keys: []"})
        assert [key.name for key in keys] == ["default", "alice", "bob", "carol", "dave", "ops"]
        assert load_keys(ServerConfig(), {}) == []
        with pytest.raises(ConfigError, match="two API keys have the name 'default'"):
            load_keys(ServerConfig(api_key="y"), {"PSHARE_API_KEY": "x"})

    @pytest.mark.parametrize(
        ("text", "wrong"),
        [
            ("- a", "expected 'keys:' and a list of keys"),
            ("keys: [{name: a, key: secret-a", "neither YAML nor JSON at line 1"),
            ("keys: [{key: x}]", "missing required field `name`"),
            ("keys: [{name: 'a b', key: x}]", "the name 'a b' is not"),
            ("keys: [{name: a, key: x, limit: 1}]", "unknown field `limit`"),
            ("keys: [{name: a}]", "key 'a': give either key or sha256"),
            ("keys: [{name: a, key: x, sha256: y}]", "key 'a': give either key or sha256"),
            ("keys: [{name: a, sha256: abc}]", "64 hexadecimal digits"),
            ("keys: [{name: a, key: ' x'}]", "without blanks"),
            ("keys: [{name: a, key: ''}]", "not empty"),
            ("keys: [{name: a, key: x, weight: 0}]", "weight must be"),
            ("keys: [{name: a, key: x, weight: .nan}]", "weight must be"),
            ("keys: [{name: a, key: x, max_concurrent: 0}]", "max_concurrent must be at least 1"),
            ("keys: [{name: a, key: x, shared_cache: true, cache_group: b}]", "give either"),
            ("keys: [{name: a, key: x, cache_group: 'b c'}]", "cache_group is not"),
            ("keys: [{name: a, key: x}, {name: a, key: y}]", "two API keys have the name 'a'"),
            ("keys: [{name: a, key: x}, {name: b, key: x}]", "'a' and 'b' are the same"),
        ],
    )
    def test_what_is_wrong_is_named_and_no_key_is_shown(self, text, wrong):
        with pytest.raises(ConfigError, match=wrong) as error:
            self.load(text)
        assert "secret" not in str(error.value)

    def test_a_file_that_is_not_there(self):
        with pytest.raises(ConfigError, match="api_keys_file: cannot read /nowhere"):
            load_keys(ServerConfig(api_keys_file="/nowhere"), {})

    def test_a_key_on_the_command_line_is_refused(self, capsys):
        assert main(["--base=x", "--server.api_key=secret"]) == 2
        error = capsys.readouterr().err
        assert "PSHARE_API_KEY" in error
        assert "secret" not in error

    def test_other_readers_of_the_file_are_warned_of(self, keys_file, caplog):
        load_keys(ServerConfig(api_keys_file=str(keys_file)), {})
        assert not caplog.records
        keys_file.chmod(0o644)
        load_keys(ServerConfig(api_keys_file=str(keys_file)), {})
        assert "can be read by other users" in caplog.text


def test_a_ring_finds_keys_and_nothing_else():
    one, two = load_keys(
        ServerConfig(), {"PSHARE_API_KEYS": "keys: [{name: a, key: x}, {name: b, key: xx}]"}
    )
    ring = KeyRing([one, two])
    assert [ring.find(token) for token in (b"x", b"xx", b"", b"xxx")] == [one, two, None, None]
    assert KeyRing([]).find(b"anything") is ANONYMOUS


class TestWhoAsks:
    def test_every_key_is_known(self, server):
        for name in ("alice", "bob", "carol", "ops"):
            assert complete(server, name).status == 200
        for headers in ({}, bearer("eve"), {"Authorization": "Bearer "}):
            answer = server.post("/v1/completions", MODEL, **headers)
            assert answer.status == 401
            assert answer.error["type"] == "authentication_error"

    def test_shares_go_by_key_and_request(self, server):
        complete(server, "alice", n=2)
        complete(server, "bob", prompt=["a", "b"], max_tokens=1)
        owners = [request.owner for request in server.engine.submitted]
        assert [(owner.key, owner.weight) for owner in owners] == [("alice", 3.0)] * 2 + [
            ("bob", 1.0)
        ] * 2
        assert owners[0].request == owners[1].request != owners[2].request == owners[3].request

    def test_priorities_are_taken(self, server):
        complete(server, "alice", priority=-2)
        chat = {"model": "planner", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        server.post("/v1/chat/completions", {**chat, "priority": 7.0}, **bearer("alice"))
        complete(server, "alice")
        assert [request.owner.priority for request in server.engine.submitted] == [-2, 7, 0]
        assert complete(server, "alice", priority=2**31).status == 400

    def test_metrics_are_for_admins_where_there_are_several_keys(self, server):
        assert server.get("/metrics").status == 401
        refused = server.get("/metrics", **bearer("alice"))
        assert (refused.status, refused.error["type"]) == (403, "permission_error")
        assert server.get("/metrics", **bearer("ops")).status == 200
        for path in ("/health", "/ready", "/version"):
            assert server.get(path).status == 200

    @pytest.mark.parametrize(
        ("metrics", "statuses"),
        [("public", [200, 200, 200]), ("key", [401, 200, 200]), ("admin", [401, 403, 200])],
    )
    def test_who_may_read_metrics(self, tokenizer, keys_file, metrics, statuses):
        config = fake_config(api_keys_file=str(keys_file), metrics=metrics)
        with running_server(fake_engine(tokenizer, config)) as client:
            asked = [{}, bearer("alice"), bearer("ops")]
            assert [client.get("/metrics", **headers).status for headers in asked] == statuses

    def test_without_keys_nobody_is_an_admin(self, tokenizer):
        config = fake_config(metrics="admin")
        with running_server(fake_engine(tokenizer, config)) as client:
            answer = client.get("/metrics")
        assert (answer.status, answer.error["code"]) == (403, "admin_key_required")
        assert "server.api_keys_file" in answer.error["message"]

    def test_keys_are_read_again(self, server, keys_file, caplog):
        access = server.server.service.access
        assert complete(server, "bob").status == 200
        keys_file.write_text(KEYS.replace("alice", "anna"))
        access.reload()
        assert complete(server, "alice").status == 401
        assert complete(server, "anna").status == 200
        left = complete(server, "bob").headers["x-ratelimit-remaining-requests"]
        assert left == "1", "what was used counts on"
        for text in ("keys: [", "keys: []"):
            keys_file.write_text(text)
            access.reload()
            assert "not read again" in caplog.text
            assert complete(server, "anna").status == 200
            assert server.post("/v1/completions", MODEL).status == 401


class TestTenants:
    SECRET = "my number is 271828 and that is all"

    def cached(self, server, name: str, prompt: str, **fields) -> tuple[int, int]:
        answer = complete(server, name, prompt=prompt, **fields)
        details = answer.json["usage"]["prompt_tokens_details"]
        return details["cached_tokens"], details["shared_tokens"]

    def test_a_guess_tells_nothing_about_another_tenants_prompt(self, server):
        assert self.cached(server, "alice", self.SECRET) == (0, 0)
        for guess in (self.SECRET, self.SECRET[:20], self.SECRET.replace("2", "3")):
            for name in ("ops", "carol"):
                first = self.cached(server, name, guess, cache_salt=f"{guess}{name}")
                assert first == (0, 0)
        assert self.cached(server, "ops", self.SECRET, cache_salt="5:alice:") == (0, 0)
        assert self.cached(server, "alice", self.SECRET)[0] > 0

    def test_keys_that_trust_each_other_share(self, server):
        assert self.cached(server, "carol", self.SECRET) == (0, 0)
        assert self.cached(server, "dave", self.SECRET)[0] > 0
        assert self.cached(server, "dave", self.SECRET, cache_salt="own") == (0, 0)

    def test_no_salt_imitates_a_tenant(self):
        alice, group = ApiKey("a", tenant="key/a"), ApiKey("b", tenant="key/a:")
        salts = ["", "x", ":", "key/a", "5:key/a:"]
        made = {key.cache_salt(salt) for key in (alice, group) for salt in salts}
        assert len(made) == 2 * len(salts)
        assert ANONYMOUS.cache_salt("x") == "x"


class TestLimits:
    def test_a_bucket_fills_up_at_its_rate(self):
        bucket = Bucket(60, now=0.0)
        bucket.take(60, 0.0)
        assert [bucket.wait(2, now) for now in (0.0, 1.5, 2.0, 9.0)] == [2.0, 0.5, 0.0, 0.0]
        bucket.take(100, 10.0)
        assert bucket.wait(1, 10.0) == 91.0
        assert bucket.level(1000.0) == 60

    def test_tokens_that_were_not_used_come_back(self):
        now = [0.0]
        account = Account(ApiKey("a", tokens_per_minute=60), lambda: now[0])
        with account.charge(10, 40) as charge:
            assert account.headers()["x-ratelimit-remaining-tokens"] == "10"
            charge.started, charge.generated = True, 5
        assert account.headers()["x-ratelimit-remaining-tokens"] == "45"
        assert account.headers()["x-ratelimit-reset-tokens"] == "15.0s"
        with account.charge(1, 1):
            pass
        assert account.headers()["x-ratelimit-remaining-tokens"] == "45", "it never ran"
        assert (account.prompt_tokens, account.generated_tokens) == (10, 5)

    def test_one_that_is_larger_than_a_minute_needs_all_of_it_and_pays_back(self):
        now = [0.0]
        account = Account(ApiKey("a", tokens_per_minute=60), lambda: now[0])
        with account.charge(50, 1000) as charge:
            charge.started, charge.generated = True, 70
        now[0] = 59.0
        with (
            pytest.raises(ApiError, match="60 tokens a minute; this needs 2") as error,
            account.charge(1, 1),
        ):
            pass
        assert error.value.headers == {"Retry-After": "3"}  # 60 over it, and 2 are needed

    def test_requests_a_minute(self, server):
        answers = [complete(server, "bob", prompt="x", max_tokens=1) for _ in range(4)]
        assert [answer.status for answer in answers] == [200, 200, 200, 429]
        remaining = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers]
        assert remaining == ["2", "1", "0", "0"]
        assert answers[0].headers["x-ratelimit-limit-tokens"] == "60"
        refused = answers[3]
        assert refused.error["type"] == "rate_limit_error"
        assert refused.error["code"] == "rate_limit_exceeded"
        assert "key 'bob' is limited to 3 requests a minute" in refused.error["message"]
        assert 15 <= int(refused.headers["Retry-After"]) <= 20
        assert complete(server, "alice").status == 200
        assert "x-ratelimit-limit-requests" not in complete(server, "alice").headers

    def test_tokens_a_minute(self, server):
        answer = complete(server, "bob", max_tokens=100)
        assert answer.status == 200, "one that needs more than a minute's may have it all"
        refused = complete(server, "bob", max_tokens=50)
        assert refused.status == 429
        assert "tokens a minute" in refused.error["message"]
        assert int(refused.headers["Retry-After"]) > 1

    def test_requests_at_once(self, server):
        server.engine.gate.clear()
        with server.raw_request("/v1/completions", MODEL) as unknown:
            assert unknown.recv(100).startswith(b"HTTP/1.1 401")
        body = json.dumps(MODEL).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key-of-bob\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with server.raw(head.encode() + body) as first:
            eventually(lambda: len(server.engine.running_ids) == 1)
            refused = complete(server, "bob", prompt="x", max_tokens=1)
            assert refused.status == 429
            assert "1 requests at once" in refused.error["message"]
            server.engine.gate.set()
            assert first.recv(1000).startswith(b"HTTP/1.1 200")
        assert complete(server, "bob", prompt="x", max_tokens=1).status == 200

    def test_metrics_by_name(self, server):
        complete(server, "bob", max_tokens=2)
        for _ in range(3):
            complete(server, "bob", prompt="x", max_tokens=1)
        text = server.get("/metrics", **bearer("ops")).body.decode()
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if "pshare_key_" in line)
        assert lines['pshare_key_requests_total{key="bob"}'] == "3.0"
        assert lines['pshare_key_refused_total{key="bob",limit="requests"}'] == "1.0"
        assert float(lines['pshare_key_generation_tokens_total{key="bob"}']) == 4.0
        assert lines['pshare_key_running{key="bob"}'] == "0.0"
        assert "key-of-bob" not in text


async def test_a_handler_of_admins():
    """As a handler sees it; the middleware has put the key there."""
    called = []

    @admin_only
    async def handler(request):
        called.append(request[KEY].name)

    request = make_mocked_request("POST", "/v1/load_lora_adapter")
    request[KEY] = ApiKey("ops", admin=True)
    await handler(request)
    for key in (ApiKey("alice"), ANONYMOUS):
        request[KEY] = key
        with pytest.raises(ApiError) as error:
            await handler(request)
        assert error.value.status == 403
    assert called == ["ops"]


def test_removed_keys_are_no_series(keys_file):
    access = Access(ServerConfig(api_keys_file=str(keys_file)))

    def series() -> set[str]:
        return {sample.labels["key"] for metric in access.collect() for sample in metric.samples}

    assert series() == {"alice", "bob", "carol", "dave", "ops"}
    keys_file.write_text("keys: [{name: alice, key: other}]")
    access.reload()
    assert series() == {"alice"}
    assert access.metrics_access == "public", "one key has nobody to hide from"
