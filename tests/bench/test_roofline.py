"""`bench machine`: the rates of this CPU, and what it says of the matrix unit."""

from __future__ import annotations

import pytest

from pshare_jax.bench import machine, roofline
from pshare_jax.errors import ConfigError
from pshare_jax.kernels.native.library import require_library


def test_rates_of_this_machine():
    result = roofline.run(roofline.MachineOptions(repeats=1, size=64, megabytes=1))
    assert result["multiplier"] == require_library().multiplier
    assert result["amx"] == machine.has_amx()
    assert set(result["gflops"]) == {"bfloat16", "float32"}
    assert min(*result["gflops"].values(), result["read_gb_per_s"]) > 0
    assert result["machine"] == machine.describe()


@pytest.mark.parametrize(
    ("amx", "multiplier", "first", "second"),
    [
        (True, "amx", "there, and used", "by the matrix unit (AMX), 8 rows: 1001 GFLOP/s"),
        (True, "vectors", "there, but not used", "by vectors, 8 rows: 1001 GFLOP/s"),
        (False, "vectors", "not there", "by vectors, 8 rows: 1001 GFLOP/s"),
    ],
)
def test_what_is_printed(amx, multiplier, first, second):
    rates = {"bfloat16": 1000.6, "float32": 400.2}
    result = {"amx": amx, "multiplier": multiplier, "gflops": rates, "read_gb_per_s": 41.26}
    assert roofline.lines({**result, "options": {"size": 8}}) == [
        f"matrix unit (AMX): {first}",
        f"bfloat16 products {second}",
        "float32 products by XLA: 400 GFLOP/s",
        "reading memory: 41.3 GB/s",
    ]


@pytest.mark.parametrize("field", ["repeats", "size", "megabytes"])
def test_nothing_to_measure_is_refused(field):
    with pytest.raises(ConfigError, match="repeats, size and megabytes must be 1 or more"):
        roofline.run(roofline.MachineOptions(**{field: 0}))
