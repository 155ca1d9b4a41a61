"""Runs the parts of `bench hardware`, each in a process of its own, within a bound of time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pshare_jax.bench import machine
from pshare_jax.bench.hardware import report
from pshare_jax.bench.hardware.parts import FAILED, PARTS, SCALES, SKIPPED, measure
from pshare_jax.errors import ConfigError
from pshare_jax.tied import tied

LEAST_SECONDS = 20
"""With less time left a part is not begun."""

_DEVICE = (
    "import json; from pshare_jax.bench.hardware.device import describe; "
    "print(json.dumps(describe()))"
)
_DEVICE_SECONDS = 90


@dataclass(frozen=True)
class HardwareOptions:
    """What is measured.

    Args:
        parts: names of parts; all if empty.
        scale: `full`, `tiny`, or `auto`: full on an accelerator, tiny on a CPU.
        seconds: that all of it may take.
        in_process: whether parts run in this process, where none can be ended from outside; for
            tests.
        markdown: file for the tables; empty writes none.
    """

    parts: list[str] = field(default_factory=list)
    scale: str = "auto"
    seconds: float = 525.0
    in_process: bool = False
    markdown: str = ""


def run(options: HardwareOptions) -> dict[str, Any]:
    """Measures part by part; a part that fails is reported, and the others go on.

    Returns:
        `{"options", "machine", "device", "scale", "parts": {name: {"status", "figures", "error",
        "seconds"}}}`; see each part's `run` for its figures.

    Raises:
        ConfigError: an unknown part or scale, or no device that JAX can use.
    """
    if unknown := [name for name in options.parts if name not in PARTS]:
        raise ConfigError(f"parts: unknown {unknown[0]!r}; choose from {', '.join(PARTS)}")
    if options.scale not in ("auto", *SCALES):
        raise ConfigError(f"scale: unknown {options.scale!r}; choose auto, full or tiny")
    end = time.monotonic() + options.seconds
    device = _device(options)
    scale = options.scale
    if scale == "auto":
        scale = "tiny" if device["platform"] == "cpu" else "full"
    result: dict[str, Any] = {
        "options": asdict(options),
        "machine": machine.describe(),
        "device": device,
        "scale": scale,
        "parts": {},
    }
    for name in options.parts or PARTS:
        started = time.monotonic()
        print(f"{name}: ", end="", file=sys.stderr, flush=True)
        found = _run_part(name, scale, end - started, in_process=options.in_process)
        found["seconds"] = time.monotonic() - started
        result["parts"][name] = found
        why = f" ({found['error']})" if found["error"] else ""
        print(f"{found['status']} in {found['seconds']:.0f} s{why}", file=sys.stderr, flush=True)
    if options.markdown:
        Path(options.markdown).write_text(report.document(result))
    return result


def failed(result: dict[str, Any]) -> bool:
    """Whether some part failed; what was skipped has not."""
    return any(part["status"] == FAILED for part in result["parts"].values())


def _device(options: HardwareOptions) -> dict[str, Any]:
    if options.in_process:
        from pshare_jax.bench.hardware.device import describe

        return describe()
    try:
        done = subprocess.run(
            tied([sys.executable, "-c", _DEVICE]),
            capture_output=True,
            text=True,
            check=False,
            timeout=_DEVICE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"JAX has found no device in {_DEVICE_SECONDS} s") from None
    if done.returncode:
        raise ConfigError(f"JAX finds no device: {_last_line(done.stderr)}")
    return json.loads(done.stdout.splitlines()[-1])


def _run_part(name: str, scale: str, left: float, *, in_process: bool) -> dict[str, Any]:
    if in_process:
        return measure(name, SCALES[scale], lambda _: None, PARTS)
    if left < LEAST_SECONDS:
        return {"status": SKIPPED, "figures": {}, "error": "no time is left"}
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "figures.json", Path(folder) / "log"
        command = [sys.executable, "-m", "pshare_jax.bench.hardware.parts", name, scale, str(file)]
        how = _bounded(command, log, min(PARTS[name].seconds, left))
        found: dict[str, Any] = {"status": FAILED, "figures": {}, "error": "it wrote nothing"}
        if file.is_file():
            found = json.loads(file.read_text())
        if how is not None:
            found |= {"status": FAILED, "error": f"{how}: {_last_line(log.read_text())}"}
        return found


def _bounded(command: list[str], log: Path, seconds: float) -> str | None:
    """Runs a command, whose output goes to a file; says how it ended unless well."""
    with log.open("w") as output:
        # A group of its own, so that its helpers (compilers, say) end with it.
        process = subprocess.Popen(
            tied(command), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"was ended after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return f"ended with code {code}" if code else None


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "it said nothing"
