"""Looks for known vulnerabilities of what `requirements.lock` names: `python .ci/audit.py`.

Exit code 1 when there are any. Where the data cannot be reached it says so and ends with 0: that is
the network's doing, and no news about the packages.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LOCK = Path(__file__).parents[1] / "requirements.lock"
COMMAND = (
    *(sys.executable, "-m", "pip_audit", "--disable-pip", "--require-hashes"),
    *("--progress-spinner", "off", "--format", "json", "--timeout", "20"),
)


def main() -> int:
    """Runs pip-audit; returns the exit code."""
    command = [*COMMAND, "--requirement", str(LOCK)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    code, lines = verdict(done.stdout)
    print("\n".join(lines))
    return code


def verdict(output: str) -> tuple[int, list[str]]:
    """The exit code and what to print, from pip-audit's JSON; it prints none when it fails."""
    try:
        packages: list[dict[str, Any]] = json.loads(output)["dependencies"]
    except (ValueError, KeyError):
        return 0, ["audit: skipped, since pip-audit cannot reach its data"]
    found = [
        f"audit: {package['name']} {package['version']}: {problem['id']}, mended in "
        f"{', '.join(problem['fix_versions']) or 'no version yet'}"
        for package in packages
        for problem in package.get("vulns", ())
    ]
    asked = [package for package in packages if "skip_reason" not in package]
    if not asked:
        return 0, ["audit: skipped, since nothing is known here about any of the packages"]
    count = f"audit: {len(asked)} of {len(packages)} packages were looked up"
    return (1 if found else 0), [*found, f"{count}, {len(found)} known vulnerabilities"]


if __name__ == "__main__":
    sys.exit(main())
