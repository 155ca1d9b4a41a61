"""What frontends and worker processes say to each other: frames over one websocket a pair.

A frontend connects to a worker process and says `Hello`; the answer is `Welcome` or `Refused`. From
then on each side sends lists of frames. Messages of the engine's parts travel in `Carry`; those of
workers to other workers go by way of the frontend whose sequence they are about, so that whatever
breaks, it is one link, and who is at its ends knows.
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
import time
from collections.abc import Iterator
from typing import Literal

import msgspec

from pshare_jax.cluster.modules import ModuleEntry
from pshare_jax.core.messages import Message
from pshare_jax.core.models import ModelSpec
from pshare_jax.core.router import WorkerInfo
from pshare_jax.core.stats import EngineStats

PROTOCOL = 4
"""Grows when frames change so that the older side would misunderstand them."""

PATH = "/cluster"
"""Of the websocket, at a worker process."""

MAX_FRAME_BYTES = 256 * 1024 * 1024

_COUNTER_BITS = 33
_INCARNATION_BITS = 30
_TICKS_BITS = 10


class Shape(msgspec.Struct, frozen=True):
    """What both sides must agree on.

    Args:
        fingerprint: of the prefill module.
        max_model_len: most tokens of a sequence.
        page: layers, KV heads, tokens and head size of a page.
        dtype: of its values, as numpy names it.
        models: the served models by name: what a certificate, a split rule and a sharing come to.
    """

    fingerprint: str
    max_model_len: int
    page: tuple[int, int, int, int]
    dtype: str
    models: dict[str, str]

    def mismatch(self, worker: Shape, *, prefills: bool) -> str | None:
        """What of a worker's shape is not as this frontend has it, by name; None if nothing.

        A decode worker may host some of the models only; one that covers prompts needs all.
        """
        for name in ("fingerprint", "max_model_len", "page", "dtype"):
            here, there = getattr(self, name), getattr(worker, name)
            # An empty dtype is that of the worker: frontends touch no page.
            if here != there and here != "":
                return f"{name} is {here} at the frontend and {there} at the worker"
        for name, digest in self.models.items():
            there = worker.models.get(name)
            if there is not None and there != digest:
                return (
                    f"model {name!r} is {digest} at the frontend and {there} at the worker: "
                    "another checkpoint, split rule or sharing"
                )
            if there is None and prefills:
                return f"model {name!r} is not known at the worker"
        return None


def model_digest(*facts: object) -> str:
    """A short name of what a served model is."""
    return hashlib.blake2b(msgspec.json.encode(facts), digest_size=8).hexdigest()


class Part(msgspec.Struct, frozen=True):
    """A worker of a process, as the router is to know it; `models` are those that it hosts."""

    info: WorkerInfo
    side: Literal["prefill", "decode"]
    models: tuple[str, ...] = ()


class Hello(msgspec.Struct, frozen=True, tag=True):
    """A frontend's first frame; its `incarnation` begins the ids of its sequences.

    `process` is longer and random: two frontends of one incarnation are told apart by it.
    """

    protocol: int
    incarnation: int
    shape: Shape
    process: str = ""


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """A worker process takes a frontend's sequences from now on; `dtype` is that of its pages.

    `modules` have come and gone while the cluster runs, see `Modules`.
    """

    incarnation: str
    parts: list[Part]
    dtype: str = ""
    modules: dict[str, ModuleEntry] = {}


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A worker process does not, and why; `again` says whether that may change by itself."""

    reason: str
    again: bool


class Carry(msgspec.Struct, frozen=True, tag=True):
    """A message of one part to another."""

    source: str
    to: str
    message: Message


class Beat(msgspec.Struct, frozen=True, tag=True):
    """The worker's engine gets on.

    Args:
        stats: what it has done since its start.
        longest_seconds: about the longest piece of work of late, during which it gives no sign.
        others: by worker, what other frontends have sent there, see `Router.note_others`.
    """

    stats: EngineStats
    longest_seconds: float = 0.0
    others: dict[str, int] = {}


class Draining(msgspec.Struct, frozen=True, tag=True):
    """The worker process wants to end, and takes no more sequences."""


class Left(msgspec.Struct, frozen=True, tag=True):
    """No sequence of this frontend needs the worker process any more."""


class Load(msgspec.Struct, frozen=True, tag=True):
    """A frontend is going to send sequences of a module that has come while the cluster runs.

    A worker that generates loads it, if it can, and says so by `Hosting`.

    Args:
        name: what clients ask for.
        folder: its checkpoint, as all hosts see it.
        weights: fingerprint of the weights that lie there.
        spec: its `name` is the model's id; where its weights lie is each worker's own.
    """

    name: str
    folder: str
    weights: str
    spec: ModelSpec


class Retired(msgspec.Struct, frozen=True, tag=True):
    """A frontend sends no more sequences of a model, and none that it has sent is left."""

    id: str


class LoadError(msgspec.Struct, frozen=True):
    """Why a module could not be loaded; `code` as of `RequestError`, or `INVALID`."""

    message: str
    code: str = ""


INVALID = "invalid_module"
"""Code of what is no decode module of this base."""


class Hosting(msgspec.Struct, frozen=True, tag=True):
    """Which modules that have come while the cluster runs a worker generates for.

    Args:
        worker: whose name it is.
        models: their ids.
        errors: why others are not there, by id.
    """

    worker: str
    models: list[str]
    errors: dict[str, LoadError] = {}


class Modules(msgspec.Struct, frozen=True, tag=True):
    """What has come and gone while the cluster runs, by name; see `cluster.modules`."""

    entries: dict[str, ModuleEntry]


class Look(msgspec.Struct, frozen=True, tag=True):
    """A frontend wants to see what the pools hold; `seen` is the number that it has been told."""

    seen: int


class Pools(msgspec.Struct, frozen=True, tag=True):
    """What the pools hold; `data` is empty if that is what has been seen, see `cluster.looks`."""

    number: int
    data: bytes


Frame = (
    Hello
    | Welcome
    | Refused
    | Carry
    | Beat
    | Draining
    | Left
    | Load
    | Retired
    | Hosting
    | Modules
    | Look
    | Pools
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Frame])


def encode(frames: list[Frame]) -> bytes:
    """Frames as msgpack."""
    return _encoder.encode(frames)


def decode(data: bytes) -> list[Frame]:
    """The inverse of `encode`.

    Raises:
        msgspec.DecodeError, msgspec.ValidationError: `data` is no list of frames.
    """
    return _decoder.decode(data)


def new_incarnation() -> int:
    """Of a frontend process; random, so that no two that live are the same."""
    return secrets.randbits(_INCARNATION_BITS)


def sequence_ids(incarnation: int) -> Iterator[int]:
    """Ids of a frontend's sequences, which say whose they are.

    They begin anywhere in the lower half of what there is: should another frontend have had the
    same incarnation, nothing that is still said of its sequences is taken for one of these.
    """
    return itertools.count((incarnation << _COUNTER_BITS) + secrets.randbits(_COUNTER_BITS - 1))


def owner_of(sequence_id: int) -> int:
    """Incarnation of the frontend whose sequence that is."""
    return sequence_id >> _COUNTER_BITS


def arrival_orders(incarnation: int) -> Iterator[int]:
    """Arrival orders that grow, that all frontends of a cluster compare, and none has twice.

    By the hosts' clocks: if these differ, who is called older is, which changes turns only.
    """
    last = 0
    while True:
        last = max(last + 1, time.time_ns() // 1000)
        yield (last << _TICKS_BITS) | (incarnation & ((1 << _TICKS_BITS) - 1))
