"""Packages that only some commands need: which extra brings them, and whether they are there."""

from __future__ import annotations

import importlib.util

from pshare_jax.errors import MissingExtraError

EXTRAS: dict[str, tuple[str, ...]] = {
    "train": ("optax", "grain", "tensorboardX"),
    "convert": ("gguf", "scipy", "huggingface_hub"),
    "eval": ("scipy",),
    "ray": ("ray",),
}
"""An extra of the distribution: the modules that it brings beside what serving needs."""


def require(extra: str, what: str, *modules: str) -> None:
    """Checks that an extra's packages can be imported, without importing them.

    Args:
        extra: one of `EXTRAS`.
        what: what needs them, for the message.
        modules: those of the extra that are needed; all of them by default.

    Raises:
        MissingExtraError: names what is missing, and the command that installs it.
    """
    missing = [name for name in modules or EXTRAS[extra] if not _installed(name)]
    if missing:
        raise MissingExtraError(
            f"{what} needs {' and '.join(missing)}, which serving does without: "
            f"pip install 'pshare_jax[{extra}]'"
        )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # an import hook refused it, or a stub without a spec
        return False
