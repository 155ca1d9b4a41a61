"""What a core asks its executor to do, and what came of it; msgspec structs that serialise."""

from __future__ import annotations

import msgspec

from pshare_jax.core.messages import PageDescriptor
from pshare_jax.core.requests import SamplingParams, TokenLogprobs


class Chunk(msgspec.Struct, frozen=True):
    """Positions of one prompt that a prefill call computes: `tokens` from `start` on."""

    id: int
    pages: list[int]
    start: int
    tokens: tuple[int, ...]


class Offer(msgspec.Struct, frozen=True):
    """Pages that are to be put on offer: pool page numbers, and their chain keys.

    `reader` says how who asked for them could read them, see `messages.Fetch`.
    """

    transfer: int
    target: str
    pages: list[int]
    keys: list[bytes]
    reader: str = ""


class Look(msgspec.Struct, frozen=True):
    """Which of these pages, of one prompt and in order, are in the KV store?

    Nobody waits for one that looks `ahead`; so it is with loads.
    """

    id: int
    keys: list[bytes]
    ahead: bool = False


class Load(msgspec.Struct, frozen=True):
    """Pages to be fetched from the store into the host's memory, each where it was found."""

    transfer: int
    keys: list[bytes]
    tokens: list[tuple[int, ...]]
    places: list[int]
    ahead: bool = False


class Commit(msgspec.Struct, frozen=True):
    """A load that is there, to be written into pool pages."""

    transfer: int
    pages: list[int]


class Save(msgspec.Struct, frozen=True):
    """A pool page to be written to the store; what follows `tokens` in it does not count."""

    key: bytes
    page: int
    tokens: tuple[int, ...]


class StorePlan(msgspec.Struct, frozen=True):
    """What is to be done with the KV store; only commits and copies for saves are waited for.

    Args:
        looks: prompts to look for.
        loads: pieces to fetch.
        commits: pieces that have been fetched.
        dropped: transfers that nobody wants any more.
        saves: pages to write.
        touched: keys of pages that were used once more.
    """

    looks: list[Look] = []
    loads: list[Load] = []
    commits: list[Commit] = []
    dropped: list[int] = []
    saves: list[Save] = []
    touched: list[bytes] = []


class Pull(msgspec.Struct, frozen=True):
    """A transfer to be pulled into pool pages `targets`; `keys` are those that were asked for.

    `address` is where they are on offer, to a connector that needs to know.
    """

    transfer: int
    source: str
    descriptors: list[PageDescriptor]
    keys: list[bytes]
    targets: list[int]
    address: str = ""


class Landed(msgspec.Struct, frozen=True):
    """A transfer has ended: well, or with an error; then nothing of it may be read."""

    transfer: int
    error: str | None = None


class PrefillPlan(msgspec.Struct, frozen=True):
    """One piece of a prefill worker's work, in this order: what ends, pulls, offers, store, copies,
    one chunk call.

    Pulls of earlier plans go on with each plan, also with an empty one.

    Args:
        offers: pages to put on offer.
        withdrawn: transfers whose pages need not be offered any more.
        cancelled: transfers to this worker that must not be written any more.
        pulls: transfers to begin.
        copies: pages to copy within the pool, (source, target).
        weights: name of the weights that compute the chunks.
        shape: rows and tokens a row of the program that holds the chunks.
        chunks: rows of the call.
        store: what is to be done with the KV store.
    """

    offers: list[Offer] = []
    withdrawn: list[int] = []
    cancelled: list[int] = []
    pulls: list[Pull] = []
    copies: list[tuple[int, int]] = []
    weights: str = ""
    shape: tuple[int, int] = (1, 1)
    chunks: list[Chunk] = []
    store: StorePlan | None = None


class PrefillResult(msgspec.Struct, frozen=True):
    """What came of a prefill plan: descriptors by transfer, and what failed, with why.

    `failed` has the ids of chunks whose KV is not there, `not_offered` transfers. What is offered
    can be pulled from its address in `addresses`, see `core.connector`. `landed` are pulls that
    have ended.
    """

    offered: dict[int, list[PageDescriptor]] = {}
    not_offered: dict[int, str] = {}
    failed: dict[int, str] = {}
    addresses: dict[int, str] = {}
    landed: list[Landed] = []


class Admit(msgspec.Struct, frozen=True):
    """A sequence gets a slot: what sampling has to know of it."""

    id: int
    slot: int
    tokens: tuple[int, ...]
    prompt_len: int
    params: SamplingParams
    seed: int
    end_token_ids: frozenset[int] = frozenset()


class Replay(msgspec.Struct, frozen=True):
    """A decode module writes its own KV of known tokens: `tokens` from `start` on."""

    id: int
    group: str
    adapter: int
    pages: list[int]
    start: int
    tokens: tuple[int, ...]
    bucket: int


class StepRow(msgspec.Struct, frozen=True):
    """One row of a decode step; the token at position `start` is fed."""

    id: int
    slot: int
    adapter: int
    pages: list[int]
    start: int


class Step(msgspec.Struct, frozen=True):
    """`count` tokens for each row of a group of models."""

    group: str
    bucket: int
    count: int
    rows: list[StepRow]


class DecodePlan(msgspec.Struct, frozen=True):
    """One piece of a decode worker's work, in this order.

    Args:
        number: of the plan; results come in the order of plans.
        cancelled: transfers that must not be written any more.
        pulls: transfers to begin.
        offers: pages to put on offer to prefill workers, see `messages.Lend`.
        admits: sequences that get a slot.
        replay: known tokens to compute, if any.
        step: tokens to generate, if any.
    """

    number: int
    cancelled: list[int] = []
    pulls: list[Pull] = []
    offers: list[Offer] = []
    admits: list[Admit] = []
    replay: Replay | None = None
    step: Step | None = None


class DecodeResult(msgspec.Struct, frozen=True):
    """What came of a decode plan's step.

    Args:
        number: of the plan.
        tokens: for each row, in order: as many as were planned; more, if others must follow, and
            none where an earlier result had it already.
        logprobs: for each row, one entry a token where they were asked for.
        plain_pages: KV pages of the step's rows, where pages that rows share are read once.
        saved_pages: of those, how many were not read again.
        failed: why, by its number, a row cannot go on.
    """

    number: int
    tokens: list[list[int]] = []
    logprobs: list[list[TokenLogprobs]] = []
    plain_pages: int = 0
    saved_pages: int = 0
    failed: dict[int, str] = {}
