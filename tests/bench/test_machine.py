"""What a result says of the machine it was measured on."""

from __future__ import annotations

import pytest

from pshare_jax.bench import machine
from pshare_jax.kernels.native.library import MARCH_VARIABLE


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("sse2 avx2 fma", "AMD EPYC with AVX2"),
        ("avx2 avx512f avx512bw", "AMD EPYC with AVX-512"),
        ("avx2 avx512f avx512_bf16", "AMD EPYC with AVX512-BF16"),
        ("avx2 avx512f avx512_bf16 amx_bf16 amx_tile", "AMD EPYC with AMX and AVX512-BF16"),
        ("sse2", "AMD EPYC"),
    ],
)
def test_cpus_of_one_name_are_told_apart(flags, expected):
    core = f"processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: {flags}\n"
    assert machine.cpu_model(core + "\n" + core) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("amx_bf16 avx512_bf16 amx_tile", True), ("amx_tile amx_int8", False), ("avx2", False)],
)
def test_the_matrix_unit_is_one_for_bfloat16(flags, expected):
    assert machine.has_amx(f"model name\t: CPU\nflags\t\t: {flags}\n") is expected


def test_a_cpu_without_a_name():
    assert machine.cpu_model("processor : 0\nFeatures : asimd\n") == ""


def test_one_line_has_machine_and_versions():
    line = machine.one_line(machine.describe())
    for part in (" cores, ", " GiB, ", "Python 3.", "jax ", "numpy "):
        assert part in line


def test_code_that_is_as_on_another_cpu_is_told_of(monkeypatch):
    monkeypatch.setenv(MARCH_VARIABLE, "x86-64-v3")
    assert machine.describe()["cpu"].endswith(", C++ for x86-64-v3")


def test_packages_that_are_not_there_are_left_out(monkeypatch):
    monkeypatch.setattr(machine, "PACKAGES", ("pshare_jax", "numpy", "no_such_package_of_anybody"))
    assert list(machine.describe()["packages"]) == ["pshare_jax", "numpy"]
