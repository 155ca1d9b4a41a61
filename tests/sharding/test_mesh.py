"""Carving devices into meshes, and asking for virtual CPU devices."""

import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pshare_jax.errors import ConfigError
from pshare_jax.sharding.mesh import (
    carve,
    meet,
    mesh_of_all_processes,
    put,
    request_cpu_devices,
    spans_processes,
)
from pshare_jax.sharding.rules import pool_sharding

count = st.integers(1, 3)


@given(count, count, count, count)
def test_meshes_are_disjoint_and_in_order(prefill, prefill_tp, decode, decode_tp):
    needed = prefill * prefill_tp + decode * decode_tp
    if needed > len(jax.devices()):
        with pytest.raises(ConfigError, match=f"need {needed} devices, but there are 8"):
            carve(jax.devices(), prefill, prefill_tp, decode, decode_tp)
        return
    prefill_meshes, decode_meshes = carve(jax.devices(), prefill, prefill_tp, decode, decode_tp)
    assert [mesh.devices.shape for mesh in prefill_meshes] == [(prefill_tp,)] * prefill
    assert [mesh.devices.shape for mesh in decode_meshes] == [(decode_tp,)] * decode
    assert {mesh.axis_names for mesh in prefill_meshes + decode_meshes} == {("tensor",)}
    used = [device for mesh in prefill_meshes + decode_meshes for device in mesh.devices]
    assert used == jax.devices()[:needed]


def test_too_few_devices_says_how_to_get_more():
    with pytest.raises(ConfigError) as error:
        carve(jax.devices()[:2], 1, 2, 1, 1)
    message = str(error.value)
    assert "need 3 devices, but there are 2 (cpu)" in message
    assert "prefill.tensor_parallel=2" in message
    assert "JAX_NUM_CPU_DEVICES=3" in message


@pytest.mark.parametrize("position", range(4))
def test_numbers_below_one_are_named(position):
    numbers = [1, 1, 1, 1]
    numbers[position] = 0
    keys = [
        "prefill.engines",
        "prefill.tensor_parallel",
        "decode.engines",
        "decode.tensor_parallel",
    ]
    with pytest.raises(ConfigError, match=f"{keys[position]} is 0"):
        carve(jax.devices(), *numbers)


def test_request_after_start():
    assert len(jax.devices()) == 8
    request_cpu_devices(8)
    request_cpu_devices(3)
    assert len(jax.devices()) == 8
    with pytest.raises(ConfigError, match=r"need 9 devices, but there are 8.*already started"):
        request_cpu_devices(9)


def test_request_before_start_never_lowers():
    program = """
        import jax
        from pshare_jax.sharding.mesh import request_cpu_devices
        request_cpu_devices(3)
        request_cpu_devices(2)
        print(len(jax.devices()))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"


class Device:
    """A device of one of several processes."""

    platform = "gpu"

    def __init__(self, process_index, id):
        self.process_index = process_index
        self.id = id


def test_a_mesh_of_several_processes_has_as_many_devices_of_each():
    devices = [Device(process, id) for process in (0, 1) for id in range(4)]
    mesh = mesh_of_all_processes(devices, 6, 2)
    found = [(device.process_index, device.id) for device in mesh.devices]
    assert found == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    with pytest.raises(ConfigError, match="needs 4 devices of each of them, but process 1 has 3"):
        mesh_of_all_processes(devices[:7], 8, 2)


def test_what_one_process_has_is_put_where_it_belongs():
    mesh = mesh_of_all_processes(jax.devices(), 2, 1)
    assert not spans_processes(mesh)
    meet(mesh)
    array = np.arange(8.0).reshape(1, 2, 4, 1, 1)
    there = put(array, pool_sharding(mesh, 4))
    np.testing.assert_array_equal(there, array)
    assert [shard.data.shape[2] for shard in there.addressable_shards] == [2, 2]
