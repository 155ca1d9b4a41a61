"""The links of a gang: who is let in, and that nobody goes on when one has ended."""

from __future__ import annotations

import errno
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import pytest

from pshare_jax.cluster import gang, gang_door
from pshare_jax.cluster.gang import GangFollower, GangLeader
from pshare_jax.config import DecodeConfig, KvStoreConfig, PrefillConfig
from pshare_jax.engine.gang import facts, hosts_of
from pshare_jax.errors import ConfigError, GangLostError
from pshare_jax.runtime.mirror import Run
from tests.engine.harness import serve_config

FACTS = {"name": "decode0", "configuration": "abc"}
TOKEN = "a token that is long enough"


def call(number: int) -> Run:
    return Run(number, "copy", [None], [], None, [])


@dataclass
class Gang:
    """A leader with followers, in threads."""

    leader: GangLeader
    followers: list[GangFollower]
    lost: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)
    drains: queue.SimpleQueue[bool] = field(default_factory=queue.SimpleQueue)

    def gather(self) -> None:
        joining = [
            threading.Thread(target=follower.join, args=(self.lost.put,), daemon=True)
            for follower in self.followers
        ]
        for thread in joining:
            thread.start()
        self.leader.gather()
        self.leader.start("127.0.0.1:9", self.lost.put, lambda: self.drains.put(True))
        for thread in joining:
            thread.join(30)
            assert not thread.is_alive()


Make = Callable[..., Gang]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Gang] = []

    def make(size: int = 3, other: Mapping[str, Any] = MappingProxyType({})) -> Gang:
        listener = socket.create_server(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        about = [{"facts": FACTS, "token": TOKEN, "size": size} for _ in range(1, size)]
        about[0] |= other
        followers = [GangFollower(address, rank, **a) for rank, a in enumerate(about, 1)]
        made.append(Gang(GangLeader(listener, size, FACTS, TOKEN), followers))
        return made[-1]

    yield make
    for one in made:
        for follower in one.followers:
            follower.close()
        one.leader.close()


def test_all_hear_the_same_in_the_same_order(make: Make) -> None:
    whole = make()
    whole.gather()
    assert [f.coordinator for f in whole.followers] == ["127.0.0.1:9"] * 2
    for follower in whole.followers:
        follower.built("as it should be")
    whole.leader.check_built("as it should be")
    for number in range(1, 50):
        whole.leader.send(call(number))
    closing = threading.Thread(target=whole.leader.close)
    closing.start()
    for follower in whole.followers:
        assert [run.number for run in follower.calls()] == list(range(1, 50))
        follower.close()
    # It waits for all of them, and nobody was lost.
    closing.join(30)
    assert not closing.is_alive()
    assert whole.lost.empty()


def test_who_has_built_something_else_is_named(make: Make) -> None:
    whole = make()
    whole.gather()
    whole.followers[0].built("float32")
    whole.followers[1].built("bfloat16")
    with pytest.raises(ConfigError, match=r"process 2 of the gang .* bfloat16, not float"):
        whole.leader.check_built("float32")


def test_any_of_them_may_ask_for_the_end(make: Make) -> None:
    whole = make(2)
    whole.gather()
    whole.followers[0].drain()
    assert whole.drains.get(timeout=30)


@pytest.mark.parametrize(
    ("other", "error"),
    [
        ({"token": "another token of that length"}, "the token of this cluster is another one"),
        ({"facts": {**FACTS, "configuration": "x"}}, "configuration is x there and abc at"),
        ({"size": 4}, "it is process 1 of 4, but the gang has 2"),
    ],
)
def test_who_does_not_belong_to_it_is_told_why(
    make: Make, other: dict[str, Any], error: str
) -> None:
    """And the gang waits for the one that does."""
    whole = make(2, other)
    gathering = threading.Thread(target=whole.leader.gather, daemon=True)
    gathering.start()
    with pytest.raises(ConfigError, match=error):
        whole.followers[0].join(whole.lost.put)
    assert gathering.is_alive()
    port = whole.followers[0]._address[1]
    right = GangFollower(f"127.0.0.1:{port}", 1, 2, FACTS, TOKEN)
    joining = threading.Thread(target=right.join, args=(whole.lost.put,), daemon=True)
    joining.start()
    gathering.join(30)
    whole.leader.start("127.0.0.1:9", whole.lost.put, lambda: None)
    joining.join(30)
    assert right.coordinator == "127.0.0.1:9"
    right.close()


def test_what_strangers_send_holds_nobody_up(make: Make) -> None:
    whole = make(2)
    port = whole.followers[0]._address[1]
    for data in (b"GET / HTTP/1.1\r\n\r\n", b"\0" * 7 + b"\3abc", b""):
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(data)
    whole.gather()
    assert whole.lost.empty()


class Door(socket.socket):
    """A listener that cannot accept, more often than there are connections greeted at once."""

    fails = 3

    def accept(self) -> tuple[socket.socket, Any]:
        if self.fails:
            self.fails -= 1
            raise OSError(errno.EMFILE, "too many open files")
        return super().accept()


def test_a_connection_that_cannot_be_accepted_does_not_close_the_door(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gang_door, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(gang_door, "MAX_GREETED", 2)
    monkeypatch.setattr(socket, "socket", Door)
    whole = make(2)
    monkeypatch.undo()
    whole.gather()
    assert whole.lost.empty()
    assert whole.leader._door._listener.fails == 0  # type: ignore[attr-defined]


def test_who_is_slow_to_say_who_it_is_holds_nobody_up(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gang_door, "HELLO_SECONDS", 1000.0)
    whole = make()
    port = whole.followers[0]._address[1]
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
    slow[1].sendall(b"\0")
    whole.gather()
    assert whole.lost.empty()
    # What comes of one after that is not let in.
    for sock in slow:
        sock.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_who_can_be_told_nothing_any_more_is_lost(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its signs of life still come."""
    monkeypatch.setattr(gang, "BEAT_SECONDS", 0.05)
    whole = make(2)
    monkeypatch.setattr(GangFollower, "_hear", lambda self, orders, on_lost: None)
    whole.gather()
    assert whole.followers[0]._orders is not None
    whole.followers[0]._orders.close()
    assert "process 1 of the gang: cannot be told anything" in whole.lost.get(timeout=30)


def test_the_end_of_one_is_the_end_of_all(make: Make) -> None:
    whole = make()
    whole.gather()
    first, second = whole.followers
    assert first._life is not None
    first._life.close()
    assert whole.lost.get(timeout=30) == "process 1 of the gang has ended"
    # Its owner ends, and the others notice.
    for orders in whole.leader._orders.values():
        orders.close()
    assert "process 0 of the gang" in whole.lost.get(timeout=30)
    with pytest.raises(GangLostError):
        list(second.calls())


def test_who_says_nothing_any_more_is_lost(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gang, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(gang, "BEAT_SECONDS", 100.0)
    whole = make(2)
    whole.gather()
    reasons = {whole.lost.get(timeout=30) for _ in range(2)}
    assert reasons == {
        "process 1 of the gang has said nothing for 0.3 s",
        "process 0 of the gang has said nothing for 0.3 s",
    }


def two_hosts(**settings: Any) -> Any:
    config = serve_config(
        prefill=PrefillConfig(tensor_parallel=2, hosts=2),
        decode=DecodeConfig(tensor_parallel=4, hosts=2),
    )
    return replace(config, **settings)


def test_what_a_mesh_of_several_hosts_cannot_do_is_refused() -> None:
    assert [hosts_of(two_hosts(), role) for role in ("prefill", "decode", "both")] == [2, 2, 2]
    assert hosts_of(serve_config(), "both") == 1
    store = KvStoreConfig("/dev/shm/x", 1000)
    with pytest.raises(ConfigError, match=r"kv_store.path: a mesh of several hosts \(prefill.hos"):
        hosts_of(two_hosts(kv_store=store), "prefill")
    assert hosts_of(two_hosts(kv_store=store), "decode") == 2
    room = DecodeConfig(tensor_parallel=2, hosts=2, max_full=2)
    with pytest.raises(ConfigError, match=r"decode.max_full: .* loads no modules while it runs"):
        hosts_of(two_hosts(decode=room), "decode")
    with pytest.raises(ConfigError, match=r"decode.hosts: 2 hosts cannot have equal parts of"):
        hosts_of(two_hosts(decode=DecodeConfig(tensor_parallel=3, hosts=2)), "decode")
    with pytest.raises(ConfigError, match=r"prefill.hosts is 2 and decode.hosts 1"):
        hosts_of(two_hosts(decode=DecodeConfig(tensor_parallel=2)), "both")


def test_what_processes_of_a_gang_have_in_common() -> None:
    """Where they listen is their own affair; what they compute is not."""
    config = two_hosts()
    known = facts(config, "decode", "decode0")
    assert known == facts(replace(config, compilation_cache_dir="/x"), "decode", "decode0")
    assert known["configuration"] != facts(two_hosts(page_size=16), "decode", "x")["configuration"]
    assert facts(config, "decode", "decode1")["name"] == "decode1"
