"""Room for LoRA modules: their stacked factors on the host, where one can be put in at any time.

The arrays have the shape that all steps are compiled for, whatever is in them, and are made without
any computation on a device: so nothing compiles when a module is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from pshare_jax.config import DecodeConfig
from pshare_jax.core.models import ModelKind
from pshare_jax.errors import ConfigError, RequestError
from pshare_jax.kernels.native.loading import give_way
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.lora import LoraModule, check_lora
from pshare_jax.models.weights import Weights, lora_specs, lora_targets


class AdapterStack:
    """The factors of up to `slots` modules, as `models.lora.stack_adapters` lays them out.

    All projections are there, adapted or not; what is not is zero, and adds nothing.

    Args:
        config: the base's architecture.
        slots: modules that there is room for.
        rank: of the stack; modules of a smaller one are padded.
        dtype: of the factors.
    """

    def __init__(self, config: ModelConfig, slots: int, rank: int, dtype: Any):
        self.slots = slots
        self.rank = rank
        self._config = config
        self._host: dict[str, np.ndarray] = {}
        for name, spec in lora_specs(config, rank, lora_targets(config)).items():
            shape = list(spec.shape)
            shape.insert(len(shape) - 1 if name.endswith(".lora_a") else 0, slots)
            self._host[name] = np.zeros(shape, jnp.dtype(dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole stack."""
        return sum(array.nbytes for array in self._host.values())

    def put(self, slot: int, module: LoraModule, *, gentle: bool = False) -> None:
        """Puts a module where another may have been.

        Args:
            slot: the place.
            module: its factors are read from memory.
            gentle: in small pieces, since others are being served.

        Raises:
            RequestError: its rank is too large, or a factor is not finite: others in a batch would
                suffer from that.
            CheckpointError: names or shapes that do not fit the base.
        """
        if module.rank > self.rank:
            raise RequestError(
                f"the module's rank is {module.rank}; there is room for ranks up to {self.rank} "
                "(decode.max_lora_rank)"
            )
        check_lora(self._config, module)
        factors = {name: np.asarray(factor) for name, factor in module.weights.items()}
        for name, factor in factors.items():
            if gentle:
                give_way()
            if not np.isfinite(factor.astype(np.float32)).all():
                raise RequestError(f"{name}: holds values that are not finite")
        scale = np.float32(module.alpha / module.rank)
        for name, stacked in self._host.items():
            if gentle:
                give_way()
            is_a = name.endswith(".lora_a")
            part = stacked[..., slot, :] if is_a else stacked[slot]
            part[...] = 0
            factor = factors.get(name)
            if factor is None:
                continue
            if is_a:
                part[..., : module.rank] = factor
            else:
                part[: module.rank] = (factor.astype(np.float32) * scale).astype(part.dtype)

    def weights(self, *, copy: bool = True) -> Weights:
        """The stack as it is now, in memory of its own; without a copy it changes with `put`."""
        # A device may use the host's memory as it is.
        return {name: array.copy() if copy else array for name, array in self._host.items()}  # type: ignore[misc]


def check_room(kinds: Sequence[ModelKind], ranks: Sequence[int], room: DecodeConfig) -> None:
    """Checks that the configured modules fit.

    Args:
        kinds: of all of them.
        ranks: of the LoRA modules.
        room: for how many.

    Raises:
        ConfigError: names the key that is too small.
    """
    limits: tuple[tuple[ModelKind, str], ...] = (("lora", "max_loras"), ("full", "max_full"))
    for kind, key in limits:
        count, limit = kinds.count(kind), getattr(room, key)
        if 0 < limit < count:
            raise ConfigError(f"decode.{key}: {limit}, but {count} such modules are configured")
    if room.max_loras and max(ranks, default=0) > room.max_lora_rank:
        raise ConfigError(
            f"decode.max_lora_rank: {room.max_lora_rank}, but a configured module has rank "
            f"{max(ranks)}"
        )
