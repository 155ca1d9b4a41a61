"""Frames, ids and orders of a cluster."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from pshare_jax.cluster import wire
from pshare_jax.cluster.modules import ModuleEntry
from pshare_jax.cluster.secret import is_loopback, read_token, split_address
from pshare_jax.core import messages as m
from pshare_jax.core.models import ModelSpec
from pshare_jax.core.requests import FinishReason
from pshare_jax.core.router import WorkerInfo
from pshare_jax.core.split_rule import LAST_TOKEN
from pshare_jax.core.stats import EngineStats, PoolStats, together
from pshare_jax.errors import ConfigError

SHAPE = wire.Shape("print", 128, (2, 2, 8, 16), "float32", {"a": "1", "b": "2"})
SPEC = ModelSpec("a@2", "full", "shared", LAST_TOKEN, "base", "print", "base")
FRAMES = [
    wire.Hello(1, 5, SHAPE),
    wire.Welcome("ab", [wire.Part(WorkerInfo("decode0", 9, 8), "decode", ("a",))]),
    wire.Refused("no", again=True),
    wire.Carry("prefill0", "decode0", m.Withdrawn(3)),
    wire.Carry("decode0", "dispatcher", m.Tokens(1 << 62, (1, 2), reason=FinishReason.STOP)),
    wire.Beat(EngineStats(prefill_tokens={("a", "computed"): 2})),
    wire.Draining(),
    wire.Left(),
    wire.Load("a", "/folder", "print", SPEC),
    wire.Retired("a@2"),
    wire.Hosting("decode0", ["a@2"], {"b@3": wire.LoadError("no room", "no_room")}),
    wire.Modules({"a": ModuleEntry(2, "a@2", "/folder", "print"), "b": ModuleEntry(3)}),
]


def test_frames_survive_the_wire() -> None:
    assert wire.decode(wire.encode(FRAMES)) == FRAMES


def test_what_is_no_frame_is_refused() -> None:
    for data in (b"", b"\x00", msgspec.msgpack.encode([{"type": "Nothing"}])):
        with pytest.raises(msgspec.DecodeError):
            wire.decode(data)


def test_ids_say_whose_they_are() -> None:
    mine, other = wire.sequence_ids(7), wire.sequence_ids((1 << 30) - 1)
    ids = [next(mine), next(mine), next(other)]
    assert len(set(ids)) == 3
    assert [wire.owner_of(id) for id in ids] == [7, 7, (1 << 30) - 1]
    assert max(ids) < 1 << 63
    assert ids[1] == ids[0] + 1
    # Should two have the same incarnation, their sequences have not the same ids.
    assert abs(next(wire.sequence_ids(7)) - next(wire.sequence_ids(7))) > 100
    assert 0 <= wire.new_incarnation() < 1 << 30


def test_orders_grow_and_are_nobody_else_s() -> None:
    mine = list(itertools.islice(wire.arrival_orders(5), 500))
    other = list(itertools.islice(wire.arrival_orders(6), 500))
    assert mine == sorted(set(mine))
    assert not set(mine) & set(other)
    assert max(other) < 1 << 63


def test_a_decode_worker_may_host_some_models_only() -> None:
    frontend = msgspec.structs.replace(SHAPE, dtype="")
    some = msgspec.structs.replace(SHAPE, models={"a": "1"})
    assert frontend.mismatch(some, prefills=False) is None
    assert frontend.mismatch(some, prefills=True) == "model 'b' is not known at the worker"
    assert frontend.mismatch(SHAPE, prefills=True) is None


def test_snapshots_of_several_processes_are_added_up() -> None:
    pools = [PoolStats(i, i, 0, 0, 0) for i in range(2)]
    one = EngineStats(generation_tokens={"a": 1}, pools={"decode0": pools[0]}, compiles=1)
    two = EngineStats(generation_tokens={"a": 2, "b": 3}, pools={"decode1": pools[1]})
    both = together([one, two])
    assert both.generation_tokens == {"a": 3, "b": 3}
    assert both.pools == {"decode0": pools[0], "decode1": pools[1]}
    assert both.compiles == 1
    assert together([]) == EngineStats()


def test_a_token_is_a_secret(tmp_path) -> None:
    file = tmp_path / "token"
    file.write_text("short\n")
    with pytest.raises(ConfigError, match="at least 16 printable"):
        read_token(str(file))
    with pytest.raises(ConfigError, match="No such file"):
        read_token(str(tmp_path / "none"))
    file.write_text("  0123456789abcdef \n")
    assert read_token(str(file)) == "0123456789abcdef"
    assert read_token("") == ""


def test_addresses() -> None:
    assert split_address("host:80") == ("host", 80)
    assert split_address("[::1]:80") == ("::1", 80)
    for wrong in ("host", ":80", "host:", "host:x", "host:70000"):
        with pytest.raises(ConfigError, match="write HOST:PORT"):
            split_address(wrong)
    assert is_loopback("127.0.0.1")
    assert not is_loopback("0.0.0.0")
