"""What the parts of an engine say to each other, as msgspec structs that serialise.

Parts are the dispatcher, which knows requests and routes them, and workers, which cover prompts
(prefill) or generate (decode). A part never holds a reference into another one: sequences go by
their id, pages by their number within a sequence, transfers by a random id.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from pshare_jax.core.models import ModelSpec
from pshare_jax.core.requests import FinishReason, PromptUsage, TokenLogprobs
from pshare_jax.core.sequences import Moved, Sequence

DISPATCHER = "dispatcher"
"""Name of the part that routes requests; workers are `prefill0`, `decode0`, ..."""


class PageDescriptor(msgspec.Struct, frozen=True):
    """What a page on offer is said to hold; a receiver compares it with what it asked for.

    Args:
        key: chain key of the page; it names the prefill fingerprint, the tenant's salt, and all
            tokens up to the page's end.
        layers: first and last + 1 layer that it holds.
        shape: of one layer, `[2, kv_heads, page_size, head_dim]`.
        dtype: of the values, as numpy names it.
        codec: how the bytes are encoded; `raw` is not at all.
        checksum: of the contents, see `kernels.page_transfer.api.page_checksums`.
    """

    key: bytes
    layers: tuple[int, int]
    shape: tuple[int, ...]
    dtype: str
    codec: str = "raw"
    checksum: int = 0


# Dispatcher -> worker, and worker -> worker.


class Prefill(msgspec.Struct, frozen=True, tag=True):
    """To a prefill worker: cover this prompt."""

    sequence: Sequence


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Nobody waits for this sequence any more; a prefill worker passes it on where it went."""

    id: int
    decode_worker: str = ""


class Covered(msgspec.Struct, frozen=True, tag=True):
    """Prefill to decode: the prompt's pages lie ready for you, held until you release them.

    Those numbered from `first` on, to the last, are on offer already where there is an `offer`.
    """

    sequence: Sequence
    usage: PromptUsage
    offer: Offered | None = None
    first: int = 0


class Withdrawn(msgspec.Struct, frozen=True, tag=True):
    """Prefill to decode: those pages are not held any more; the sequence will come again."""

    id: int


class Fetch(msgspec.Struct, frozen=True, tag=True):
    """Decode to prefill: offer these pages, numbered within the sequence, to `worker`.

    `reader` says how it could read them, to a connector that needs to know.
    """

    worker: str
    transfer: int
    id: int
    pages: list[int]
    reader: str = ""


class Offered(msgspec.Struct, frozen=True, tag=True):
    """To who asked for pages: those of a transfer can be pulled; one descriptor each.

    `address` says where, to a connector that needs to know; `id` is the sequence's.
    """

    transfer: int
    descriptors: list[PageDescriptor]
    address: str = ""
    id: int = -1


class NotOffered(msgspec.Struct, frozen=True, tag=True):
    """To who asked for pages: those of a transfer, for the sequence `id`, cannot be had."""

    transfer: int
    reason: str
    id: int = -1


class Release(msgspec.Struct, frozen=True, tag=True):
    """Decode to prefill: the pages of that sequence need not be held any more.

    `worker`, if not empty, says who speaks, and `reader`, as of `Fetch`, how it would read others.
    """

    id: int
    worker: str = ""
    reader: str = ""


class Lend(msgspec.Struct, frozen=True, tag=True):
    """To any worker: offer `worker` those of these full pages that your index holds.

    They are wanted to cover the prompt of the sequence `id`, which is not yours; the answer is
    `Offered`, with as many of the first ones as there are, or `NotOffered`.

    Args:
        worker: a prefill worker, which asks.
        transfer: random id of the transfer.
        id: of the sequence.
        keys: of the pages, one after the other.
        tokens: that they hold.
        reader: as of `Fetch`.
    """

    worker: str
    transfer: int
    id: int
    keys: list[bytes]
    tokens: tuple[int, ...]
    reader: str = ""


class Repaid(msgspec.Struct, frozen=True, tag=True):
    """What was asked for by `Lend`, for the sequence `id`, has come or is not wanted any more.

    Without a transfer that is all that was.
    """

    id: int
    transfer: int | None = None


class IndexWanted(msgspec.Struct, frozen=True, tag=True):
    """To any worker: a change of your index was missed; say what it holds."""


class Replied(msgspec.Struct, frozen=True, tag=True):
    """To a prefill worker: a reply has ended, and the next prompt probably begins with it.

    Args:
        sequence: of the prompt and the reply together, all covered; its pages are pinned for `ttl`.
        known: leading full pages that were covered for the prompt.
        ahead: whether the rest is to be covered when nothing else is to be done.
    """

    sequence: Sequence
    known: int
    ahead: bool


class Expected(msgspec.Struct, frozen=True, tag=True):
    """To a prefill worker: a prompt that begins with this one is expected soon."""

    sequence: Sequence


class SetRole(msgspec.Struct, frozen=True, tag=True):
    """To a worker of a mesh that may have either role: it works from now on, or lets all go.

    A prefill worker that works and has got a colleague gives back what waits, to be divided anew.
    """

    works: bool
    anew: bool = False


class ModelAdded(msgspec.Struct, frozen=True, tag=True):
    """To every worker: a model, under an id of its own; its weights are where they are needed."""

    spec: ModelSpec


class ModelRemoved(msgspec.Struct, frozen=True, tag=True):
    """To every worker: no sequence of that model is left or will come."""

    model: str


class WeightsFreed(msgspec.Struct, frozen=True, tag=True):
    """To a decode worker: no model is left of that group; its weights are not needed any more."""

    group: str


# KV store -> prefill worker.


class Looked(msgspec.Struct, frozen=True, tag=True):
    """Where the pages of a look are, up to the first that is nowhere, see `core.prices`."""

    id: int
    places: list[int]


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """A load has ended: all its pages lie in the host's memory, or none with an error."""

    transfer: int
    error: str | None = None


class Stored(msgspec.Struct, frozen=True, tag=True):
    """Of pages to be written: `done` are no longer on their way, `kept` are in the store; `gone`
    are pages that were touched but are not there any more."""

    done: list[bytes]
    kept: list[bytes]
    gone: list[bytes]


# Worker -> dispatcher.


class Pending(msgspec.Struct, frozen=True, tag=True):
    """Prompt tokens of a sequence that a prefill worker still has to compute."""

    id: int
    tokens: int


class IndexChanged(msgspec.Struct, frozen=True, tag=True):
    """Chain keys of full pages that have entered and left a worker's prefix index.

    `number` counts the changes of one worker from 1 on, so that who misses one notices;
    `incarnation` is another one whenever the worker has started anew.
    """

    added: list[bytes]
    removed: list[bytes]
    number: int = 0
    incarnation: int = 0


class IndexSnapshot(msgspec.Struct, frozen=True, tag=True):
    """Chain keys of all full pages in a worker's prefix index, after its change `number`."""

    keys: list[bytes]
    number: int
    incarnation: int = 0


class StoreChanged(msgspec.Struct, frozen=True, tag=True):
    """Chain keys of pages that the KV store has, and of those that it has no longer."""

    added: list[bytes]
    removed: list[bytes]


class Started(msgspec.Struct, frozen=True, tag=True):
    """A sequence has a decode slot, and all pages of its prompt are there."""

    id: int
    usage: PromptUsage


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """Tokens that a sequence has generated; with a reason they are its last."""

    id: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    reason: FinishReason | None = None


class Returned(msgspec.Struct, frozen=True, tag=True):
    """The worker has let go of a sequence, which has to be routed again.

    `cause` is `preempted` (an older one needed its pages), `fetch` (its pages did not arrive) or
    `moved` (the mesh does something else from now on; it may take its KV along).
    """

    id: int
    cause: Literal["preempted", "fetch", "moved"]
    detail: str = ""
    moved: Moved | None = None


class Dropped(msgspec.Struct, frozen=True, tag=True):
    """The worker has let go of a sequence that was aborted."""

    id: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The worker cannot compute a sequence."""

    id: int
    error: str


FromStore = Looked | Loaded | Stored
ToWorker = (
    Prefill
    | Abort
    | Covered
    | Withdrawn
    | Fetch
    | Offered
    | NotOffered
    | Release
    | Lend
    | Repaid
    | IndexWanted
    | Replied
    | Expected
    | SetRole
    | ModelAdded
    | ModelRemoved
    | WeightsFreed
)
OfAttempt = Started | Tokens | Returned | Dropped | Failed
"""What becomes of an attempt at a request."""

ToDispatcher = Pending | IndexChanged | IndexSnapshot | StoreChanged | OfAttempt
Message = ToWorker | FromStore | ToDispatcher

Outbox = list[tuple[str, Message]]
"""Messages, each with the name of the part that it goes to."""


def offered_by(message: Message) -> Offered | None:
    """Pages that a message says are on offer, if it does."""
    match message:
        case Offered():
            return message
        case Covered():
            return message.offer
        case _:
            return None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """A message as msgpack."""
    return _encoder.encode(message)


def decode(data: bytes) -> Message:
    """The inverse of `encode`.

    Raises:
        msgspec.ValidationError: `data` is no message.
    """
    return _decoder.decode(data)
