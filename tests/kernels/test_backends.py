"""Choosing an implementation by name."""

import pytest

from pshare_jax.errors import ConfigError
from pshare_jax.kernels.backends import BACKEND_NAMES, backend_for, on_mesh, select_backend
from pshare_jax.kernels.kv_write import api as kv_write
from pshare_jax.kernels.page_transfer import api as page_transfer
from pshare_jax.kernels.paged_attention import api as paged_attention
from pshare_jax.kernels.shared_prefix_attention import api as shared_prefix_attention

TABLES = [
    paged_attention.BACKENDS,
    shared_prefix_attention.BACKENDS,
    kv_write.BACKENDS,
    page_transfer.GATHER,
    page_transfer.SCATTER,
    page_transfer.COPY,
]


@pytest.mark.parametrize("table", TABLES)
def test_every_op_has_the_same_backends_and_prefers_xla(table):
    assert tuple(table) == BACKEND_NAMES
    assert select_backend("op", table, "auto") is table["xla"]
    assert select_backend("op", table, "reference") is table["reference"]


def test_unknown_backend_names_op_and_choices():
    with pytest.raises(ValueError, match="op: unknown backend 'c'; choose one of auto, a, b"):
        select_backend("op", {"a": 1, "b": 2}, "c")


@pytest.mark.parametrize(
    ("setting", "platform", "backend"),
    [
        ("auto", "cpu", "cpu_ffi"),
        ("xla", "cpu", "xla"),
        ("auto", "tpu", "pallas_tpu"),
        ("auto", "gpu", "pallas_gpu"),
        ("xla", "tpu", "xla"),
        ("pallas_gpu_interpret", "cpu", "pallas_gpu_interpret"),
    ],
)
def test_auto_goes_by_platform_and_a_name_overrides_it(setting, platform, backend):
    assert backend_for(setting, platform) == backend


def test_a_mesh_of_several_devices_is_left_to_xla():
    assert [on_mesh("cpu_ffi", size) for size in (1, 2)] == ["cpu_ffi", "xla"]
    assert on_mesh("pallas_tpu", 2) == "pallas_tpu"


def test_cpp_is_refused_elsewhere():
    with pytest.raises(ConfigError, match="cpu_ffi runs on CPUs, but JAX runs on tpu"):
        backend_for("cpu_ffi", "tpu")
