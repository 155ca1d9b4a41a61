"""`python -m pshare_jax.serve.ray_drain SECONDS`: a host of Ray that is about to go.

Ends what the launcher has had Ray place here, in good order, and lets nothing more be placed: the
launcher then has it placed elsewhere.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from pshare_jax.serve.ray_actor import leaving_file, take_lock


def drain_host(seconds: float) -> list[str]:
    """Ends the processes of all clusters of this user on this host; blocks.

    Args:
        seconds: that a process may take to end in good order.

    Returns:
        Files of the locks that they had.

    Raises:
        OSError: the folder of the locks cannot be used.
    """
    leaving = leaving_file()
    leaving.touch(mode=0o600)
    locks = sorted(leaving.parent.glob("*/*.lock"))

    def end(lock: Path) -> None:
        os.close(take_lock(lock, seconds))

    enders = [threading.Thread(target=end, args=(lock,)) for lock in locks]
    for ender in enders:
        ender.start()
    for ender in enders:
        ender.join()
    return [str(lock) for lock in locks]


def main(argv: Sequence[str]) -> int:
    """Drains this host; 0 once nothing runs here any more."""
    for lock in drain_host(float(argv[0])):
        print(f"pshare_jax: ended {lock}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
