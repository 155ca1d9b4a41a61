"""Decode modules that come and go while the engine runs: their weights, and room for them.

A module that is loaded gets weights of its own under an id that was never used: a new group of
models if it is a full one, a free place in the stack of adapters if it is a LoRA module. Every step
is compiled for these shapes already. What is loaded anew under a name is another module beside the
former, whose requests go on with what they had; its place is free when the last of them has ended.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections import Counter
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from pshare_jax.core.models import ModelKind, ModelSpec
from pshare_jax.engine.adapter_stack import AdapterStack
from pshare_jax.engine.loader import WeightLoader
from pshare_jax.engine.memory import available_bytes
from pshare_jax.engine.sources import BASE, BaseSource, ModelSource, loaded_spec
from pshare_jax.errors import RequestError
from pshare_jax.models.weights import weight_specs
from pshare_jax.runtime.executor import DecodeExecutor, GroupWeights

NO_ROOM = "no_room"
"""Code of the error that says that there is no room."""


class Modules:
    """What the decode workers' weights are taken up by.

    Args:
        base: the prefill module.
        loader: loads weights; its meshes are built.
        executors: of the decode workers, by name.
        max_full: full modules that there may be; 0 is none but those that are there.
        sources: the models that are served from the start.
        specs: the same as the engine knows them.
    """

    def __init__(
        self,
        base: BaseSource,
        loader: WeightLoader,
        executors: Mapping[str, DecodeExecutor],
        max_full: int,
        sources: Sequence[ModelSource],
        specs: Mapping[str, ModelSpec],
    ):
        self._base = base
        self._loader = loader
        self.workers = list(executors)
        self._executors = list(executors.values())
        self._max_full = max_full
        self._lock = threading.Lock()
        self._users: Counter[tuple[str, int]] = Counter()
        self._prints: dict[str, tuple[str, int]] = {}
        self._ids = {spec.name for spec in specs.values()}
        self._numbers = itertools.count(2)
        for source in sources:
            if source.certificate is None or source.sharing != "shared":
                continue
            place = _place(specs[source.name])
            self._users[place] += 1
            self._prints[source.certificate.weights_fingerprint] = place

    def load(self, name: str, source: ModelSource, *, anew: bool) -> ModelSpec:
        """Loads a module onto every decode mesh; called by one thread at a time.

        Args:
            name: what clients will ask for.
            source: the module; it shares the base's KV.
            anew: whether its weights are loaded even if the same ones are there under another name.

        Returns:
            How the engine is to know it. What it takes up is given back by `free`.

        Raises:
            RequestError: no room for it, or factors that cannot be served.
            CheckpointError: weights that cannot be loaded.
        """
        fingerprint = source.certificate.weights_fingerprint if source.certificate else ""
        id = self._new_id(name)
        place = None if anew else self._share(fingerprint)
        if place is None:
            place = self._take(source.kind, id)
            try:
                self._install(source, place)
            except BaseException:
                self._give_back(place)
                raise
            with self._lock:
                if fingerprint:
                    self._prints[fingerprint] = place
        return loaded_spec(source, self._base, id, *place, len(self._executors))

    def free(self, spec: ModelSpec) -> str | None:
        """Gives back what a module of which no request is left took up.

        Returns:
            The group whose weights are not needed any more, if there is one.
        """
        place = _place(spec)
        return spec.group if self._give_back(place) and spec.group != BASE else None

    def _new_id(self, name: str) -> str:
        id = name
        while id in self._ids:
            id = f"{name}@{next(self._numbers)}"
        self._ids.add(id)
        return id

    def _share(self, fingerprint: str) -> tuple[str, int] | None:
        """The place of the same weights, if they are there."""
        with self._lock:
            place = self._prints.get(fingerprint)
            if place is not None:
                self._users[place] += 1
            return place

    def _take(self, kind: ModelKind, id: str) -> tuple[str, int]:
        """A free place, which is taken from now on."""
        with self._lock:
            if kind == "lora":
                return self._take_slot()
            used = sum(group != BASE for group, _ in self._users)
            if used >= self._max_full:
                raise RequestError(
                    f"{used} full modules are loaded or still in use, and there is room for "
                    f"{self._max_full} (decode.max_full); unload one first",
                    code=NO_ROOM,
                )
            place = f"full/{id}", -1
            self._users[place] = 1
            return place

    def _take_slot(self) -> tuple[str, int]:
        slots = 0 if self._loader.stack is None else self._loader.stack.slots
        free = [slot for slot in range(slots) if (BASE, slot) not in self._users]
        if not free:
            raise RequestError(
                f"all of the {slots} places for LoRA modules are taken (decode.max_loras); unload "
                "one first",
                code=NO_ROOM,
            )
        self._users[BASE, free[0]] = 1
        return BASE, free[0]

    def _give_back(self, place: tuple[str, int]) -> bool:
        """Whether nobody uses the place any more."""
        with self._lock:
            self._users[place] -= 1
            if self._users[place] > 0:
                return False
            del self._users[place]
            self._prints = {p: where for p, where in self._prints.items() if where != place}
            return True

    def _install(self, source: ModelSource, place: tuple[str, int]) -> None:
        group, slot = place
        meshes = [executor.programs.mesh for executor in self._executors]
        stack = self._loader.stack
        if group != BASE:
            self._check_memory(self._full_bytes(), "the module's weights")
            placed = self._loader.full_on(source, meshes)
        elif stack is not None:
            self._check_memory(2 * stack.nbytes, "the stack of adapters, made anew,")
            placed = self._with_module(stack, slot, source)
        else:
            raise AssertionError("a place in a stack that is not there")
        for executor, weights in zip(self._executors, placed, strict=True):
            executor.install(group, weights)

    def _with_module(
        self, stack: AdapterStack, slot: int, source: ModelSource
    ) -> list[GroupWeights]:
        meshes = [executor.programs.mesh for executor in self._executors]
        stack.put(slot, self._loader.lora_factors(source, meshes[0]), gentle=True)
        adapters = self._loader.adapters_on(stack, meshes)
        return [
            dataclasses.replace(executor.weights(BASE), adapters=stacked)
            for executor, stacked in zip(self._executors, adapters, strict=True)
        ]

    def _full_bytes(self) -> int:
        """Bytes of a full module on one device while it is loaded."""
        # As loaded: weights of 8 bits are made of others, a group at a time.
        numbers = sum(int(np.prod(spec.shape)) for spec in weight_specs(self._base.config).values())
        programs = self._executors[0].programs
        # Packed weights are a second copy, made of the first.
        copies = 2 if programs.spec.packed else 1
        size = copies * numbers * jnp.dtype(self._loader.dtype).itemsize
        return size // programs.mesh.size

    def _check_memory(self, needed: int, what: str) -> None:
        for executor in self._executors:
            for device in executor.programs.mesh.devices.flat:
                available = available_bytes(device)
                if available is not None and needed > available:
                    raise RequestError(
                        f"{what} would take {needed / 1e6:.0f} MB; {available / 1e6:.0f} MB are "
                        f"free on {device}",
                        code=NO_ROOM,
                    )


def _place(spec: ModelSpec) -> tuple[str, int]:
    return spec.group, spec.adapter
