"""The parts of `bench hardware`, and the process that runs one of them.

`python -m pshare_jax.bench.hardware.parts NAME SCALE FILE` writes to FILE what it has measured so
far, after each figure, so that a part which ends badly leaves what it had.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pshare_jax.bench.hardware.scale import FULL, TINY, Scale

SCALES = {"full": FULL, "tiny": TINY}
OK, SKIPPED, FAILED = "ok", "skipped", "failed"


class Part(NamedTuple):
    """One part: what it measures, the function that does, and seconds that it may take."""

    title: str
    run: Callable[[Scale, Callable[[str, Any], None]], None]
    seconds: float


def _part(module: str) -> Callable[[Scale, Callable[[str, Any], None]], None]:
    """`run` of a module, imported when it runs: what it needs may not be installed."""

    def run(scale: Scale, keep: Callable[[str, Any], None]) -> None:
        importlib.import_module(f"pshare_jax.bench.hardware.{module}").run(scale, keep)

    return run


def _serving(scale: Scale, keep: Callable[[str, Any], None], *, large: bool) -> None:
    from pshare_jax.bench.hardware import serving

    serving.run(scale, scale.large if large else scale.small, keep)


PARTS = {
    "kernels": Part("Kernels", _part("kernels"), 100),
    "torch": Part("PyTorch's attention", _part("torch_attention"), 40),
    "handoff": Part("Moving pages", _part("transfer"), 40),
    # Where C++ has not been compiled yet, that comes first.
    "codec": Part("Compressing pages", _part("codec"), 90),
    "serve-1b": Part("Serving, 1B", functools.partial(_serving, large=False), 110),
    "serve-8b": Part("Serving, 8B", functools.partial(_serving, large=True), 150),
    "agents": Part("Agents over one context", _part("agents"), 150),
}
"""In the order in which they run: what is quick and what the others build on comes first."""


def measure(
    name: str, scale: Scale, write: Callable[[dict[str, Any]], None], table: dict[str, Part]
) -> dict[str, Any]:
    """Runs a part in this process; gives `{"status", "figures", "error"}` and writes it as it
    grows.

    Args:
        name: of the part.
        scale: sizes.
        write: called with what is known so far.
        table: the parts.
    """
    from pshare_jax.bench.hardware.device import SkippedError

    result: dict[str, Any] = {"status": FAILED, "figures": {}, "error": "it ended in the middle"}

    def keep(figure: str, value: Any) -> None:
        result["figures"][figure] = value
        write(result)

    try:
        table[name].run(scale, keep)
        result |= {"status": OK, "error": None}
        if wrong := result["figures"].get("wrong"):
            result |= {"status": FAILED, "error": "; ".join(wrong)}
    except SkippedError as why:
        result |= {"status": SKIPPED, "error": str(why)}
    except ModuleNotFoundError as error:
        result |= {"status": SKIPPED, "error": f"needs the package {error.name}"}
    except Exception as error:
        result |= {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    write(result)
    return result


def writer(file: str) -> Callable[[dict[str, Any]], None]:
    """Writes results to a file, each whole in the place of the one before."""
    target = Path(file)

    def write(result: dict[str, Any]) -> None:
        target.with_suffix(".new").write_text(json.dumps(result))
        target.with_suffix(".new").replace(target)

    return write


def _main(name: str, scale: str, file: str) -> None:
    # One part after another has the device to itself; a quarter of it is JAX's own reserve.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    measure(name, SCALES[scale], writer(file), PARTS)


if __name__ == "__main__":
    _main(*sys.argv[1:])
