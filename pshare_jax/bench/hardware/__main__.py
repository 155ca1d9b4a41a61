"""`python -m pshare_jax.bench.hardware`: as `bench hardware`, where only JAX is installed.

The parts that need what serving needs say so; kernels, transfers and the codec need JAX and numpy.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from pshare_jax.bench.hardware import report, run
from pshare_jax.errors import PshareError


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="pshare_jax.bench.hardware", description=run.__doc__)
    parser.add_argument("--parts", nargs="*", default=[], metavar="PART")
    parser.add_argument("--scale", default="auto", help="auto, full or tiny")
    parser.add_argument("--seconds", type=float, default=run.HardwareOptions.seconds)
    parser.add_argument("--json", default="", help="file for the figures")
    parser.add_argument("--markdown", default="", help="file for the tables")
    given = parser.parse_args()
    options = run.HardwareOptions(
        parts=given.parts, scale=given.scale, seconds=given.seconds, markdown=given.markdown
    )
    try:
        result = run.run(options)
    except PshareError as error:
        print(f"pshare_jax.bench.hardware: {error}", file=sys.stderr)
        return 2
    if given.json:
        Path(given.json).write_text(json.dumps(result, indent=2) + "\n")
    print(report.document(result), end="")
    return 1 if run.failed(result) else 0


if __name__ == "__main__":
    sys.exit(main())
