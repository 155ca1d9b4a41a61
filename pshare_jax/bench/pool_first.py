"""The first engine of `bench pool`, in a process of its own, and how it is asked."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from pshare_jax.bench.first_token import FirstToken, engine_of, first_token, settle
from pshare_jax.bench.pool_socket import LEASE_SECONDS, OWNER, OfferingEnd, Piece, page_server
from pshare_jax.config import DType, KvStoreConfig
from pshare_jax.core.messages import PageDescriptor
from pshare_jax.errors import BenchmarkError
from pshare_jax.kv.offers import OfferFolder
from pshare_jax.kv.pieces import page_descriptor
from pshare_jax.kv.remote import RemotePages

START_SECONDS = 300.0
ANSWER_SECONDS = 150.0
STOP_SECONDS = 20.0


@dataclass(frozen=True)
class EngineSpec:
    """Both engines of the benchmark: arguments of `engine_of`."""

    base: str
    dtype: DType
    tokens: int
    prompts: int
    page_size: int
    store: KvStoreConfig


class FirstEngine:
    """The first engine as the second one's process sees it."""

    def __init__(self, pipe: Connection):
        self._pipe = pipe

    def ask(
        self, id: str, prompt: tuple[int, ...], salt: str = "", *, offering: bool = False
    ) -> tuple[FirstToken, list[Piece]]:
        """Has a prompt answered and written to the store; `offering` also puts it on offer.

        Raises:
            BenchmarkError: it fails, here as below.
        """
        return self._call("ask", id, prompt, salt, offering)

    def offer(self, transfer: int, count: int) -> tuple[Piece, float, float]:
        """Puts pages of no meaning on offer; also seconds and processor seconds of that."""
        return self._call("offer", transfer, count)

    def cpu(self) -> float:
        """Processor seconds that its process has used."""
        return self._call("cpu")

    def wait_until_ready(self) -> None:
        """Waits until it can be asked."""
        self._answer(START_SECONDS)

    def _call(self, *command: Any) -> Any:
        self._pipe.send(command)
        return self._answer(ANSWER_SECONDS)

    def _answer(self, seconds: float) -> Any:
        try:
            if not self._pipe.poll(seconds):
                raise BenchmarkError(f"the first engine has not answered for {seconds:g} s")
            ok, answer = self._pipe.recv()
        except (EOFError, OSError):
            raise BenchmarkError("the process of the first engine has ended") from None
        if not ok:
            raise BenchmarkError(f"the first engine: {answer}")
        return answer


@contextmanager
def first_engine(spec: EngineSpec, folder: Path) -> Iterator[FirstEngine]:
    """The first engine, for as long as a `with` block lasts; it may not be ready yet.

    Args:
        spec: what it is.
        folder: in shared memory, for its offers.
    """
    processes = multiprocessing.get_context("spawn")
    here, there = processes.Pipe()
    process = processes.Process(target=_main, args=(there, spec, folder), daemon=True)
    process.start()
    there.close()
    try:
        yield FirstEngine(here)
    finally:
        # Its pipe ends, and so does it.
        here.close()
        process.join(STOP_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()


def _main(pipe: Connection, spec: EngineSpec, folder: Path) -> None:
    try:
        with ExitStack() as stack:
            first = _First(stack, spec, folder)
            pipe.send((True, None))
            while True:
                name, *arguments = pipe.recv()
                pipe.send((True, getattr(first, name)(*arguments)))
    except EOFError:
        pass  # nobody asks any more
    except Exception as error:
        pipe.send((False, f"{type(error).__name__}: {error}"))


class _First:
    """What the process does, by the names of `FirstEngine`."""

    def __init__(self, stack: ExitStack, spec: EngineSpec, folder: Path):
        self._engine = stack.enter_context(
            engine_of(spec.base, spec.dtype, spec.tokens, spec.prompts, spec.page_size, spec.store)
        )
        executor = self._engine.workers.prefill[0].executor
        assert executor.store is not None
        self._layout, self._programs = executor.programs.layout, executor.programs
        self._offers = OfferFolder(folder, LEASE_SECONDS)
        stack.callback(self._offers.close)
        url = stack.enter_context(page_server(self._offers.path))
        self._remote = RemotePages(OWNER, self._programs, executor.pool, self._offers, url)
        stack.callback(self._remote.close)
        self._end = OfferingEnd(executor.store, self._remote)
        executor.store = self._end

    def ask(
        self, id: str, prompt: tuple[int, ...], salt: str, offering: bool
    ) -> tuple[FirstToken, list[Piece]]:
        self._end.offering = offering
        answer = first_token(self._engine, id, prompt, salt)
        settle(self._engine)
        return answer, self._end.taken()

    def offer(self, transfer: int, count: int) -> tuple[Piece, float, float]:
        layout = self._layout
        staged = np.zeros(self._programs.staged_shape(count), layout.dtype)
        staged.view(np.uint8)[:] = 1
        started, used = time.perf_counter(), time.process_time()
        self._offers.put(transfer, OWNER, [staged], count, time.monotonic())
        seconds, cpu = time.perf_counter() - started, time.process_time() - used
        one = page_descriptor(layout)
        keys = [bytes([i]) for i in range(count)]
        descriptors = [PageDescriptor(key, one.layers, one.shape, one.dtype) for key in keys]
        return Piece(transfer, keys, [], descriptors, self._remote.address), seconds, cpu

    def cpu(self) -> float:
        return time.process_time()
