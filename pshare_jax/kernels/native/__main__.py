"""`python -m pshare_jax.kernels.native`: compiles the CPU kernels ahead of their first use."""

from __future__ import annotations

import logging

from pshare_jax.errors import ConfigError
from pshare_jax.kernels.native.library import load_library


def main() -> None:
    """Compiles, or says why not. Never fails: everything works without these kernels."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        load_library()
    except ConfigError as error:
        logging.warning("CPU kernels are not compiled: %s", error)


if __name__ == "__main__":
    main()
