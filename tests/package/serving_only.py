"""Imports as in an installation without extras: put in front of a program, it hides their packages.

jax itself depends on scipy, and flax on optax: those two are hidden from pshare_jax alone.
"""

import sys

ABSENT = {"grain", "tensorboardX", "gguf", "matplotlib", "opentelemetry", "pyseccomp"}
ABSENT |= {"jaxtyping", "beartype"}  # annotations are text, and checked by tests alone
OF_OTHERS = {"optax", "scipy"}


class Hider:
    """Refuses packages of extras to whoever imports them."""

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in ABSENT or (top in OF_OTHERS and _importer() == "pshare_jax"):
            raise ModuleNotFoundError(f"No module named {name!r} without extras", name=name)


def _importer() -> str:
    """The package whose statement it is."""
    frame = sys._getframe(2)
    while frame.f_globals.get("__name__", "").partition(".")[0] == "importlib":
        frame = frame.f_back
    return frame.f_globals.get("__name__", "").partition(".")[0]


sys.meta_path.insert(0, Hider())
