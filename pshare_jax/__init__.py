"""PrefillShare in JAX: one frozen prefill module, many fine-tuned decode modules, one KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pshare_jax.core.requests import SamplingParams
    from pshare_jax.engine.offline import Completion, Engine

__version__ = "0.1.0"
__all__ = ["Completion", "Engine", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Loads the public classes on first use, so that importing the package stays quick."""
    if name in ("Completion", "Engine"):
        from pshare_jax.engine import offline

        return getattr(offline, name)
    if name == "SamplingParams":
        from pshare_jax.core.requests import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
