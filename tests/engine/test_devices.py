"""Who lies on which devices: meshes of their own, or one for both sides."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from pshare_jax.config import DecodeConfig, PrefillConfig, ServeConfig
from pshare_jax.engine.devices import num_devices, place
from pshare_jax.engine.limits import PoolSizes
from pshare_jax.errors import ConfigError


def config(connector: Any = "auto", **sides: Any) -> ServeConfig:
    prefill, decode = sides.get("prefill", {}), sides.get("decode", {})
    return ServeConfig(
        base="base",
        connector=connector,
        prefill=PrefillConfig(**prefill),
        decode=DecodeConfig(**decode),
    )


def with_devices(monkeypatch: pytest.MonkeyPatch, count: int) -> list[Any]:
    devices = jax.devices()[:count]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    return devices


def test_with_devices_enough_each_side_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = with_devices(monkeypatch, 3)
    meshes = place(config(decode={"engines": 2}))
    assert not meshes.one_pool
    assert meshes.one_processor
    assert [mesh.devices.tolist() for mesh in meshes.prefill] == [devices[:1]]
    assert [mesh.devices.tolist() for mesh in meshes.decode] == [devices[1:2], devices[2:3]]


def test_one_device_serves_both(monkeypatch: pytest.MonkeyPatch) -> None:
    [device] = with_devices(monkeypatch, 1)
    meshes = place(config())
    assert meshes.one_pool
    assert meshes.prefill is meshes.decode
    assert [mesh.devices.tolist() for mesh in meshes.decode] == [[device]]


def test_one_mesh_by_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = with_devices(monkeypatch, 4)
    sides = {"prefill": {"engines": 2}, "decode": {"engines": 2}}
    meshes = place(config("same-mesh", **sides))
    assert meshes.one_pool
    assert [mesh.devices.tolist() for mesh in meshes.decode] == [devices[:1], devices[1:2]]
    assert num_devices(config("same-mesh", **sides)) == 2
    assert num_devices(config("auto", **sides)) == 4


@pytest.mark.parametrize("key", ["engines", "tensor_parallel"])
def test_sides_that_differ_cannot_share_a_mesh(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    with_devices(monkeypatch, 2)
    with pytest.raises(ConfigError, match=f"prefill.{key} is 1 and decode.{key} 2: .* equal"):
        place(config(decode={key: 2}))


def test_meshes_of_their_own_that_were_asked_for_are_not_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_devices(monkeypatch, 1)
    with pytest.raises(ConfigError, match="need 2 devices, but there are 1"):
        place(config("device_put"))


def test_one_mesh_too_needs_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    with_devices(monkeypatch, 1)
    sides = {"prefill": {"tensor_parallel": 4}, "decode": {"tensor_parallel": 4}}
    with pytest.raises(ConfigError, match="need 4 devices, but there are 1"):
        place(config("same-mesh", **sides))


def test_one_pool_has_the_larger_size_and_a_page_for_a_copied_end() -> None:
    assert PoolSizes(40, 28).shared == 41
    assert PoolSizes(17, 28).shared == 29
