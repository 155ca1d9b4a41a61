"""What `bench micro` measures: engines that take token ids and give events, here or elsewhere."""

from __future__ import annotations

import itertools
import json
import os
import queue
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec

from pshare_jax.core.requests import Request, RequestOutput, SamplingParams
from pshare_jax.engine.orchestrator import Orchestrator
from pshare_jax.errors import BenchmarkError, EngineDeadError

MODEL = "base"
"""The name under which every target knows its one full model."""

EVENT_SECONDS = 300
START_SECONDS = 600
_WORKER = Path(__file__).parent / "vllm_worker.py"


class Event(NamedTuple):
    """What a request got in a step: number of new tokens, and whether it has ended."""

    request_id: str
    tokens: int
    finished: bool


class Target(Protocol):
    """An engine whose requests decode greedily and ignore the end of sequence token."""

    def submit(self, prompt: Sequence[int], max_tokens: int, model: str) -> str:
        """Starts a request; returns its id."""
        ...

    def next(self) -> Event:
        """The next event of any request.

        Raises:
            EngineDeadError, BenchmarkError: the engine failed.
        """
        ...

    def abort(self, request_id: str) -> None:
        """Ends a request that has not ended yet; an event says when it has."""
        ...


class EngineTarget:
    """This project's engine, in this process.

    Args:
        engine: started.
        params: how to sample; `max_tokens` is replaced.
    """

    def __init__(self, engine: Orchestrator, params: SamplingParams | None = None):
        self._engine = engine
        self._params = params or SamplingParams(temperature=0.0, ignore_eos=True)
        self._events: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        self._ids = map("micro-{}".format, itertools.count())

    def submit(self, prompt: Sequence[int], max_tokens: int, model: str) -> str:
        """See `Target.submit`."""
        params = msgspec.structs.replace(self._params, max_tokens=max_tokens)
        request = Request(next(self._ids), model, tuple(prompt), params)
        self._engine.submit(request, self._events.put)
        return request.id

    def next(self) -> Event:
        """See `Target.next`."""
        output = self._events.get(timeout=EVENT_SECONDS)
        if output.error is not None:
            raise EngineDeadError(output.error)
        return Event(output.request_id, len(output.token_ids), output.finish_reason is not None)

    @property
    def has_event(self) -> bool:
        """Whether `next` would not wait."""
        return not self._events.empty()

    def abort(self, request_id: str) -> None:
        """See `Target.abort`."""
        self._engine.abort(request_id)


class VllmTarget:
    """vLLM's engine in a process of its own, under the Python that has it installed.

    Args:
        python: an interpreter that can import vllm.
        model: a Hugging Face folder.
        max_model_len: in tokens.
        max_num_seqs: rows that run at a time.
        kv_gib: memory for KV.
        preload: libraries for `LD_PRELOAD`.

    Raises:
        BenchmarkError: the process does not come up.
    """

    def __init__(
        self,
        python: str,
        model: str,
        max_model_len: int,
        max_num_seqs: int,
        kv_gib: int,
        preload: Sequence[str] = (),
    ):
        arguments = [model, str(max_model_len), str(max_num_seqs), str(kv_gib)]
        try:
            self._process = subprocess.Popen(
                [python, str(_WORKER), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | ({"LD_PRELOAD": ":".join(preload)} if preload else {}),
            )
        except OSError as error:
            raise BenchmarkError(f"{python}: cannot be started: {error.strerror}") from None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._waiting: list[Event] = []
        self._ids = map("micro-{}".format, itertools.count())
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.packages: dict[str, str] = self._line(START_SECONDS)["packages"]
        except BaseException:
            self.close()
            raise

    def submit(self, prompt: Sequence[int], max_tokens: int, model: str) -> str:
        """See `Target.submit`; `model` is not used."""
        del model
        request_id = next(self._ids)
        self._send({"submit": request_id, "prompt": list(prompt), "max_tokens": max_tokens})
        return request_id

    def next(self) -> Event:
        """See `Target.next`."""
        while not self._waiting:
            self._waiting = [Event(*event) for event in self._line(EVENT_SECONDS)["events"]]
        return self._waiting.pop(0)

    def abort(self, request_id: str) -> None:
        """See `Target.abort`."""
        self._send({"abort": request_id})

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None

    def _line(self, seconds: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise BenchmarkError(f"vLLM's process said nothing for {seconds:.0f} s") from None
        if not line:
            raise self._ended()
        return json.loads(line)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _ended(self) -> BenchmarkError:
        code = self._process.wait()
        return BenchmarkError(f"vLLM's process ended with code {code}; its messages are above")
