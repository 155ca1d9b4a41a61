"""An attempt at a request, as workers know it."""

from __future__ import annotations

from functools import cached_property

import msgspec

from pshare_jax.core.requests import Owner, SamplingParams

Part = tuple[str, ...]
"""A client, a model of it, or a request to that: each is the beginning of the next."""


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


class Sequence(msgspec.Struct, frozen=True, kw_only=True, dict=True):
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
        num_there: leading full pages that the router thinks `decode_worker` has.
        lender: a worker that is thought to have more of the prompt's pages than `prefill_worker`.
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
    num_there: int = 0
    lender: str = ""
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

    # Whoever plans asks for these two again and again, of all that wait.
    @cached_property
    def chain(self) -> list[bytes]:
        """The keys of all that the prefill module covers, the last page included."""
        return [*self.keys, self.last_key]

    @cached_property
    def path(self) -> tuple[Part, Part, Part]:
        """The parts that it belongs to, see `shares`: its client, down to its request."""
        owner = self.owner
        request = owner.request or f"#{self.order}"
        return (owner.key,), (owner.key, self.model), (owner.key, self.model, request)

    def parent_key(self, index: int) -> bytes:
        """Chain key of the page before page `index`."""
        return self.keys[index - 1] if index else self.root
