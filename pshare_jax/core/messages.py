"""Everything that the parts of an engine say to each other, as msgspec structs that serialise.

Parts are the dispatcher, which knows requests and routes them, and workers, which cover prompts
(prefill) or generate (decode). A part never holds a reference into another one: sequences go by
their id, pages by their number within a sequence, transfers by a random id.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

import msgspec

from pshare_jax.core.constraints import GrammarSpec, Thoughts
from pshare_jax.core.models import ModelSpec

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300

DISPATCHER = "dispatcher"
"""Name of the part that routes requests; workers are `prefill0`, `decode0`, ..."""


class SamplingParams(msgspec.Struct, frozen=True):
    """How the next token is chosen; the defaults are OpenAI's and vLLM's.

    Order on the device: masks, repetition, presence and frequency penalties, logit bias,
    temperature, min-p, top-k, top-p. `temperature` 0 (or less than 1e-5) is greedy; `top_k` 0,
    `top_p` 1 and `min_p` 0 are off; equal scores are kept or dropped together. `logprobs` asks for
    the log-probability (of the unmodified distribution, natural log) of the chosen token and of
    that many most likely ones; None asks for none. `stop_token_ids` come on top of the model's own
    end tokens, which `ignore_eos` turns off unless there is a grammar. `prompt_logprobs` asks for
    the log-probability of each prompt token and of that many most likely ones in its place
    (`core/prompt_scores.py`); `max_tokens` may be 0.

    Masks leave out tokens: what does not follow `grammar`, once the `thoughts` before it have
    ended; what is not in `allowed_token_ids`, unless those are empty; the last token of each of
    `bad_words` (token ids) where the answer ends with those before it; and what would end an answer
    of less than `min_tokens`. A mask that would leave nothing gives way, a grammar never does.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    prompt_logprobs: int | None = None
    grammar: GrammarSpec | None = None
    thoughts: Thoughts | None = None
    min_tokens: int = 0
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()

    @property
    def masked(self) -> bool:
        """Whether which tokens may come next depends on those that came."""
        limited = self.allowed_token_ids or self.bad_words or self.min_tokens > 0
        return self.grammar is not None or bool(limited)


class Session(msgspec.Struct, frozen=True):
    """What a client says about the calls to come; hints, which change no token.

    Args:
        id: calls of one id (and one salt) stay with the same workers; empty is no session.
        ttl: seconds for which the pages should outlive the call.
        next_models: names of the models that will be asked next.
    """

    id: str = ""
    ttl: float = 0.0
    next_models: tuple[str, ...] = ()


class Owner(msgspec.Struct, frozen=True):
    """Whose a sequence is, for fair shares.

    Args:
        key: name of the client; clients share what there is by their weights.
        weight: share of the client, relative to others that want something.
        request: what the client has asked for at once; a client's share is divided among its
            requests, whatever their number of sequences. Empty is a request of its own.
        priority: among a client's requests; lower is earlier.
    """

    key: str = ""
    weight: float = 1.0
    request: str = ""
    priority: int = 0


class Request(msgspec.Struct, frozen=True):
    """One sequence to be generated: `prompt_token_ids` by `model`.

    Requests with different `cache_salt` never share pages. A `probe` is part of another request's
    work, which counters do not count. `goes_on` says that the next prompt will probably begin with
    this one and its reply, see `core.sessions`.
    """

    id: str
    model: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = msgspec.field(default_factory=SamplingParams)
    cache_salt: str = ""
    probe: bool = False
    owner: Owner = Owner()
    session: Session = Session()
    goes_on: bool = True


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class PromptUsage(msgspec.Struct, frozen=True):
    """Where the KV of a prompt came from, in tokens.

    `prompt_tokens = computed + cached + tail`: the tail (at least 1) is read by the decode module.
    Of the cached tokens, `shared` were computed for another model.
    """

    prompt_tokens: int
    computed_tokens: int
    cached_tokens: int
    shared_tokens: int
    handoff_bytes: int = 0


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Natural-log probabilities at one position: the chosen token's, and the most likely ones'."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class RequestTimes(msgspec.Struct):
    """When the dispatcher heard what of a request, in seconds of its host's monotonic clock.

    Only the first attempt's: a request that is routed again keeps them.

    Args:
        submitted: it was taken; of the engine, before the dispatcher has heard of it.
        prefill: a prefill worker had begun with its prompt.
        covered: all of the prompt's KV was there, computed or found.
        started: a decode worker had its pages and a slot.
        routed: its workers were chosen.
        prefill_worker: which covers its prompt.
        decode_worker: which generates.
    """

    submitted: float
    prefill: float | None = None
    covered: float | None = None
    started: float | None = None
    routed: float | None = None
    prefill_worker: str = ""
    decode_worker: str = ""


class RequestOutput(msgspec.Struct, frozen=True):
    """One event of a request.

    Token events carry `token_ids` (one or more, with one `logprobs` entry each when asked for).
    The first event carries `usage` and `times`, the last one `times`, too, and `finish_reason`; the
    stop token that ended the sequence is its last token id and `stop_token` names it. `error` goes
    with ERROR. `prompt_logprobs`, when asked for, come once, before any token: an entry for each
    prompt token, None for the first.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    usage: PromptUsage | None = None
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    error: str | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    times: RequestTimes | None = None


class Moved(msgspec.Struct, frozen=True):
    """KV that a sequence takes along from a mesh that it leaves.

    Args:
        worker: prefill worker of that mesh, which holds the pages until they are released.
        id: of the attempt that they are held for.
        num_kv: first positions that have KV.
        keys: of all pages with KV. Those of full pages of the covered positions are in an index;
            the others, which a decode module has written in, name model and tokens and never are.
    """

    worker: str
    id: int
    num_kv: int
    keys: list[bytes]


class Sequence(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt at a request, as workers know it.

    Args:
        id: of this attempt; a request that is routed again gets a new one, so that what an old
            worker still says of it is recognised as stale.
        order: arrival order of the request; the smaller, the older.
        model: id of the model, see `ModelSpec`.
        prompt: token ids.
        output: tokens that earlier attempts have generated and delivered.
        covered: the first positions of the prompt, which the prefill module covers.
        adapted: whether the model's LoRA adapter is on; without, the base's weights answer.
        root: key that the chain of keys starts from, see `pages.prefix_index`.
        keys: chained keys of the full pages of the covered positions.
        last_key: one more for all covered positions, the last, half-filled page included.
        params: how to sample.
        seed: of its random draws.
        end_token_ids: tokens that end it.
        num_uncached: prompt tokens that the router expects to be computed.
        prefill_worker: who covers the prompt.
        decode_worker: who generates.
        probe: whether counters leave it out, see `Request`.
        owner: whose it is, for fair shares.
        ttl: seconds for which its pages should outlive it.
        moved: KV that it takes along, if another mesh has generated some of `output`.
    """

    id: int
    order: int
    model: str
    prompt: tuple[int, ...]
    output: tuple[int, ...] = ()
    covered: int
    adapted: bool = True
    root: bytes
    keys: list[bytes]
    last_key: bytes
    params: SamplingParams
    seed: int = 0
    end_token_ids: frozenset[int] = frozenset()
    num_uncached: int = 0
    prefill_worker: str = ""
    decode_worker: str = ""
    probe: bool = False
    owner: Owner = Owner()
    ttl: float = 0.0
    moved: Moved | None = None

    @property
    def held_id(self) -> int:
        """What `prefill_worker` knows it by."""
        return self.id if self.moved is None else self.moved.id

    @property
    def num_held(self) -> int:
        """First positions whose KV lies there."""
        return self.covered if self.moved is None else self.moved.num_kv

    @property
    def held_keys(self) -> list[bytes]:
        """Keys of the pages that lie there."""
        return self.chain if self.moved is None else self.moved.keys

    @property
    def num_tokens(self) -> int:
        """Known tokens: the prompt's and the generated ones."""
        return len(self.prompt) + len(self.output)

    @property
    def chain(self) -> list[bytes]:
        """The keys of all that the prefill module covers, the last page included."""
        return [*self.keys, self.last_key]

    def parent_key(self, index: int) -> bytes:
        """Chain key of the page before page `index`."""
        return self.keys[index - 1] if index else self.root


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
    """Prefill to decode: the prompt's pages lie ready for you, held until you release them."""

    sequence: Sequence
    usage: PromptUsage


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
    """Prefill to decode: the pages of a transfer can be pulled; one descriptor each.

    `address` says where, to a connector that needs to know; `id` is the sequence's.
    """

    transfer: int
    descriptors: list[PageDescriptor]
    address: str = ""
    id: int = -1


class NotOffered(msgspec.Struct, frozen=True, tag=True):
    """Prefill to decode: the pages of a transfer, for the sequence `id`, cannot be had."""

    transfer: int
    reason: str
    id: int = -1


class Release(msgspec.Struct, frozen=True, tag=True):
    """Decode to prefill: the pages of that sequence need not be held any more."""

    id: int


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
    | IndexWanted
    | Replied
    | Expected
    | SetRole
    | ModelAdded
    | ModelRemoved
    | WeightsFreed
)
ToDispatcher = (
    Pending
    | IndexChanged
    | IndexSnapshot
    | StoreChanged
    | Started
    | Tokens
    | Returned
    | Dropped
    | Failed
)
Message = ToWorker | FromStore | ToDispatcher

Outbox = list[tuple[str, Message]]
"""Messages, each with the name of the part that it goes to."""

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
