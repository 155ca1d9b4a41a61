"""One mesh, several processes: the first says what runs, the others run the same in the same order.

A computation over the devices of several processes must be begun by all of them. The first process
has the engine; whatever that runs goes through `Programs`, which `Mirror` wraps. So each call is
told to the others before it is made: the name of the program, its small arguments as they are, and
of those that lie on the devices only which they are. `Replay` makes the same call there, with the
same weights, pool and history, which every process has made for itself.
"""

from __future__ import annotations

import collections
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from pshare_jax.errors import PshareError
from pshare_jax.runtime.pool import PagePool, Pages
from pshare_jax.runtime.programs import NAMES, Call, Programs, Slot

_KEPT = (Slot.STAGED, Slot.LEFT)
"""Of which there may be several at a time: they have numbers."""


class OutOfStepError(PshareError):
    """What is said to be run cannot be run here; the mesh is of no use any more."""


class Host(msgspec.Struct, frozen=True, array_like=True):
    """An array of the host."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @classmethod
    def of(cls, value: Any) -> Host:
        """An array, or a number of numpy's."""
        array = np.ascontiguousarray(value)
        data = array.reshape(-1).view(np.uint8).data
        return cls(array.dtype.name, np.shape(value), data)

    @property
    def array(self) -> np.ndarray:
        """The same again, not to be written to."""
        return np.frombuffer(self.data, jnp.dtype(self.dtype)).reshape(self.shape)


class Run(msgspec.Struct, frozen=True, array_like=True, tag="run"):
    """A call.

    Args:
        number: counts the calls.
        program: its name.
        slots: what lies on the devices, an entry an argument of that kind: the name of weights
            (None: it has none), the number of an array, and None for the pool and the history.
        hosts: all other arguments, flattened.
        gives: the number of the result that is kept, if one is.
        forget: arrays that nobody will name any more.
        compiles: whether this is to be compiled only; it will be said again to be run.
    """

    number: int
    program: str
    slots: list[str | int | None]
    hosts: list[Host]
    gives: int | None
    forget: list[int]
    compiles: bool = False


class _Signature(msgspec.Struct, frozen=True):
    """Where the arguments and results of a program belong; None is on the host, or not kept."""

    arguments: tuple[Slot | None, ...]
    results: tuple[Slot | None, ...]

    @classmethod
    def of(cls, call: Call) -> _Signature:
        slots = tuple(a if isinstance(a, Slot) else None for a in call.arguments)
        return cls(slots, call.results)


def _program(call: Call) -> str:
    """The program of a call, whose name may say more."""
    return call.name.split(",")[0]


def _signatures(calls: Iterable[Call]) -> dict[str, _Signature]:
    found = {_program(call): _Signature.of(call) for call in calls}
    found["stage"] = _Signature((None,), (Slot.STAGED,))
    return found


class Mirror:
    """The side of the first process.

    Args:
        programs: of the mesh, before they are wrapped.
        weights: all weights and adapters that programs are given, by a name that is the same in all
            processes.
        send: has the other processes make a call; must keep the order.
        compiled: waits until they have compiled what they were told to.

    Attributes:
        warming: whether what is called is compiled first, everywhere: a process that waits in a
            collective for one that still compiles gives up after a while.
    """

    def __init__(
        self,
        programs: Programs,
        weights: Mapping[str, Any],
        send: Callable[[Run], None],
        compiled: Callable[[], None],
    ):
        self.warming = True
        self._signatures = _signatures(programs.all_calls())
        # Kept, so that an id means the same for ever.
        self._weights = dict(weights)
        self._names = {id(value): name for name, value in self._weights.items()}
        self._send = send
        self._compiled = compiled
        self._lock = threading.Lock()
        self._calls = 0
        self._kept: dict[int, int] = {}
        self._arrays = 0
        self._gone: collections.deque[tuple[int, int]] = collections.deque()

    def wrap(self, name: str, function: Any) -> Any:
        """What is called in place of a program: see `Programs.wrap`."""
        signature = self._signatures[name]

        def call(*arguments: Any) -> Any:
            # Two threads must not begin in another order than they say.
            with self._lock:
                run = self._run(name, signature, arguments)
                if self.warming and hasattr(function, "lower"):
                    self._send(msgspec.structs.replace(run, compiles=True))
                    function.lower(*arguments).compile()
                    self._compiled()
                self._send(run)
                results = function(*arguments)
                self._keep(signature, results)
            return results

        return call

    def _run(self, name: str, signature: _Signature, arguments: Sequence[Any]) -> Run:
        slots: list[str | int | None] = []
        others: list[Any] = []
        for slot, value in zip(signature.arguments, arguments, strict=True):
            match slot:
                case None:
                    others.append(value)
                case Slot.WEIGHTS | Slot.ADAPTERS:
                    slots.append(None if value is None else self._names[id(value)])
                case Slot.STAGED | Slot.LEFT:
                    slots.append(self._kept[id(value)])
                case _:
                    slots.append(None)
        forget = self._forgotten()
        self._calls += 1
        gives = None
        if any(slot in _KEPT for slot in signature.results):
            self._arrays += 1
            gives = self._arrays
        hosts = [Host.of(leaf) for leaf in jax.tree.leaves(others)]
        return Run(self._calls, name, slots, hosts, gives, forget)

    def _keep(self, signature: _Signature, results: Any) -> None:
        """Numbers the result that may be an argument again, for as long as it lives here."""
        for slot, value in zip(signature.results, _listed(signature, results), strict=True):
            if slot in _KEPT:
                self._kept[id(value)] = number = self._arrays
                gone = self._gone
                weakref.finalize(value, gone.append, (id(value), number)).atexit = False

    def _forgotten(self) -> list[int]:
        forget = []
        while self._gone:
            place, number = self._gone.popleft()
            forget.append(number)
            # Another array may lie there by now.
            if self._kept.get(place) == number:
                del self._kept[place]
        return forget


class Replay:
    """The side of another process. One thread at a time uses it.

    Args:
        programs: of the mesh.
        pool: its pages, which nobody else uses.
        weights: as of the `Mirror`.
        history: of the decode side, if this is one.
    """

    def __init__(
        self, programs: Programs, pool: PagePool, weights: Mapping[str, Any], history: Any = None
    ):
        calls = list(programs.all_calls())
        self._functions = {name: getattr(programs, name) for name in NAMES}
        self._signatures = _signatures(calls)
        self._structures = dict(_structure(call) for call in calls)
        self._structures["stage", 1] = jax.tree.structure((0,))
        self._pool = pool
        self._weights = weights
        self._history = history
        self._kept: dict[int, Any] = {}
        self._calls = 0

    @property
    def num_kept(self) -> int:
        """Arrays that may be named."""
        return len(self._kept)

    def run(self, run: Run) -> None:
        """Makes a call, or compiles it; does not wait for what it gives.

        Raises:
            OutOfStepError: it is not the next one, or names what is not here.
        """
        if run.number != self._calls + 1:
            raise OutOfStepError(f"call {run.number} has come after call {self._calls}")
        if not run.compiles:
            self._calls = run.number
        for number in run.forget:
            self._kept.pop(number, None)
        try:
            signature = self._signatures[run.program]
            structure = self._structures[run.program, len(run.hosts)]
            hosts = iter(jax.tree.unflatten(structure, [host.array for host in run.hosts]))
            slots = iter(run.slots)
            arguments = [
                next(hosts) if slot is None else self._argument(slot, next(slots))
                for slot in signature.arguments
            ]
        except (KeyError, StopIteration) as error:
            raise OutOfStepError(f"call {run.number}, {run.program}: no {error} here") from error
        self._pool.own()
        self._pool.update(lambda pages: self._call(run, signature, arguments, pages))
        self._pool.disown()

    def _argument(self, slot: Slot, name: str | int | None) -> Any:
        match slot:
            case Slot.WEIGHTS | Slot.ADAPTERS:
                return None if name is None else self._weights[str(name)]
            case Slot.STAGED | Slot.LEFT:
                return self._kept[int(name or 0)]
            case _:
                return slot

    def _call(
        self, run: Run, signature: _Signature, arguments: Sequence[Any], pages: Pages
    ) -> tuple[Pages, None]:
        there = {Slot.POOL: pages, Slot.HISTORY: self._history}
        given = [there[a] if isinstance(a, Slot) else a for a in arguments]
        if run.compiles:
            self._functions[run.program].lower(*given).compile()
            return pages, None
        results = self._functions[run.program](*given)
        for slot, value in zip(signature.results, _listed(signature, results), strict=True):
            if slot is Slot.POOL:
                pages = value
            elif slot is Slot.HISTORY:
                self._history = value
            elif slot in _KEPT and run.gives is not None:
                self._kept[run.gives] = value
        return pages, None


def _listed(signature: _Signature, results: Any) -> Sequence[Any]:
    """One program's results, of which there may be one."""
    return (results,) if len(signature.results) == 1 else results


def _structure(call: Call) -> tuple[tuple[str, int], Any]:
    """How the host's arguments of a call lie, by program and number of arrays."""
    hosts = tuple(a for a in call.arguments if not isinstance(a, Slot))
    leaves, structure = jax.tree.flatten(hosts)
    return (_program(call), len(leaves)), structure
