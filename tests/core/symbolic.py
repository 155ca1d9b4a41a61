"""Pools, executors and a connector that compute KV as digests of all that it depends on.

The KV at a position is a digest of who wrote it, the position, the token there, and the KV at all
positions before it as the page table of the row shows it; a generated token is a digest of all of
a row's KV. So a wrong, torn, stale or unfilled page, a wrong position, and a lost or repeated token
all change what is generated, and `oracle` says what should be.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from pshare_jax.config import DecodeConfig
from pshare_jax.core.chunk_planner import chunk_shapes
from pshare_jax.core.connector import TransferError, TransferState, check_descriptors
from pshare_jax.core.messages import PageDescriptor
from pshare_jax.core.plans import (
    Admit,
    Chunk,
    DecodePlan,
    DecodeResult,
    Landed,
    Offer,
    PrefillPlan,
    PrefillResult,
    Pull,
)
from pshare_jax.core.requests import TokenLogprobs
from pshare_jax.core.store_end import StoreEnd
from pshare_jax.runtime.pulls import Pulls, make_offers

VOCAB = 2**20

T = TypeVar("T")


def digest(*parts: Any) -> int:
    """64 bits of what `parts` are."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def through_wire(value: T) -> T:
    """The value as it is when it has been sent."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=type(value))


def oracle(
    prefill: str,
    decode: str,
    prompt: Sequence[int],
    covered: int,
    max_tokens: int,
    end_token_ids: Collection[int] = (),
    forces: bool = False,
) -> list[int]:
    """What a writer `decode` generates after a writer `prefill` has covered `covered` positions."""
    kv: list[int] = []
    tokens = list(prompt)
    while True:
        for position in range(len(kv), len(tokens)):
            writer = prefill if position < covered else decode
            kv.append(digest(writer, position, tokens[position], kv))
        token = next_token(decode, kv)
        for following in (token, *(forced_after(token) if forces else ())):
            tokens.append(following)
            if following in end_token_ids or len(tokens) - len(prompt) == max_tokens:
                return tokens[len(prompt) :]


def forced_after(token: int) -> list[int]:
    """What must follow a token where there is a grammar; often nothing."""
    count = max(digest("how many", token) % 12 - 5, 0)
    return [digest("forced", token, number) % VOCAB for number in range(count)]


def next_token(writer: str, kv: list[int]) -> int:
    """The token after positions with that KV."""
    return digest("token", writer, kv) % VOCAB


def module(group: str, adapter: int) -> str:
    """A decode module as a writer of KV."""
    return f"{group}/{adapter}"


def prefill_writer(weights: str, root: bytes) -> str:
    """Prefill weights as a writer of KV; with the tenant, so that none reads another's pages."""
    return f"{weights}/{root.hex()}"


class SymbolicPool:
    """Page contents; every slot begins with a value that no computation gives."""

    def __init__(self, num_pages: int, page_size: int):
        self.page_size = page_size
        self.pages = [[-1] * page_size for _ in range(num_pages)]

    def read(self, pages: Sequence[int], stop: int) -> list[int]:
        """KV at positions 0 .. stop-1 of a page table."""
        return [self.pages[pages[p // self.page_size]][p % self.page_size] for p in range(stop)]

    def write(self, pages: Sequence[int], position: int, value: int) -> None:
        """Writes the KV of a position."""
        page = pages[position // self.page_size]
        assert page != 0, f"position {position} lies in the padding page"
        self.pages[page][position % self.page_size] = value

    def extend(self, pages: Sequence[int], start: int, tokens: Sequence[int], writer: str) -> None:
        """Computes the KV of `tokens` at positions from `start` on."""
        for position, token in enumerate(tokens, start=start):
            kv = self.read(pages, position)
            self.write(pages, position, digest(writer, position, token, kv))


@dataclass
class Link:
    """What is on offer, and what is to go wrong next."""

    offers: dict[int, tuple[str, list[list[int]]]] = field(default_factory=dict)
    offer_faults: deque[str] = field(default_factory=deque)
    accept_faults: deque[str] = field(default_factory=deque)

    def drop_worker(self, worker: str) -> None:
        """Forgets what a lost worker has offered."""
        for transfer in [t for t, (source, _) in self.offers.items() if source == worker]:
            del self.offers[transfer]


@dataclass
class _Arriving:
    pull: Pull
    contents: list[list[int]]
    polls: float


class SymbolicConnector:
    """One worker's end. Faults: offers are `refused` or `lost`; what is accepted is `refused`,
    `late`, `never` there, or `corrupt`."""

    def __init__(self, worker: str, pool: SymbolicPool, link: Link):
        self.worker, self.pool, self.link = worker, pool, link
        self.arriving: dict[int, _Arriving] = {}

    def offer(self, offer: Offer) -> list[PageDescriptor]:
        """See `Connector.offer`."""
        fault = self.link.offer_faults.popleft() if self.link.offer_faults else ""
        if fault == "refused":
            raise TransferError(f"transfer {offer.transfer}: refused")
        contents = [list(self.pool.pages[page]) for page in offer.pages]
        if fault != "lost":
            assert offer.transfer not in self.link.offers
            self.link.offers[offer.transfer] = self.worker, contents
        sums = [digest(content) for content in contents]
        return [_descriptor(key, s) for key, s in zip(offer.keys, sums, strict=True)]

    def accept(self, pull: Pull) -> None:
        """See `Connector.accept`."""
        fault = self.link.accept_faults.popleft() if self.link.accept_faults else ""
        if pull.transfer not in self.link.offers:
            raise TransferError(f"transfer {pull.transfer}: nothing is on offer")
        source, contents = self.link.offers.pop(pull.transfer)
        assert source == pull.source
        check_descriptors(pull, _descriptor(b"", 0))
        if fault == "refused":
            raise TransferError(f"transfer {pull.transfer}: refused")
        if fault == "corrupt":
            contents[-1][0] ^= 1
        polls = {"late": 3, "never": math.inf}.get(fault, 0)
        self.arriving[pull.transfer] = _Arriving(pull, contents, polls)

    def poll(self, transfer: int) -> TransferState:
        """See `Connector.poll`."""
        arriving = self.arriving[transfer]
        arriving.polls -= 1
        return TransferState.READY if arriving.polls < 0 else TransferState.ARRIVING

    def commit(self, transfer: int) -> None:
        """See `Connector.commit`."""
        arriving = self.arriving.pop(transfer)
        pull = arriving.pull
        for said, content in zip(pull.descriptors, arriving.contents, strict=True):
            if digest(content) != said.checksum:
                raise TransferError(f"transfer {transfer}: corrupt")
        for target, content in zip(pull.targets, arriving.contents, strict=True):
            self.pool.pages[target] = list(content)

    def address_of(self, transfer: int) -> str:
        """See `Connector.address_of`."""
        return ""

    def abort(self, transfer: int) -> None:
        """See `Connector.abort`."""
        self.link.offers.pop(transfer, None)
        self.arriving.pop(transfer, None)


def _descriptor(key: bytes, checksum: int) -> PageDescriptor:
    return PageDescriptor(key, (0, 1), (2, 1, 4, 1), "int64", "raw", checksum)


class SymbolicPrefill:
    """Carries out prefill plans. `failures` chunks are going to fail, half written."""

    def __init__(
        self,
        connector: SymbolicConnector,
        chunk_buckets: list[int],
        root_of: Callable[[int], bytes],
    ):
        self.connector, self.pool = connector, connector.pool
        self.pulls = Pulls(connector)
        self.shapes = chunk_shapes(chunk_buckets)
        self.failures = 0
        self.store: StoreEnd | None = None
        self._root_of = root_of

    def own(self) -> None:
        """See `PrefillRuns`."""

    def run(self, plan: PrefillPlan) -> PrefillResult:
        """See `PrefillRuns`."""
        plan = through_wire(plan)
        for transfer in plan.withdrawn:
            self.connector.abort(transfer)
        landed = self.pulls.run(plan.cancelled, plan.pulls)
        made = make_offers(self.connector, plan.offers)
        result = PrefillResult(made.offered, made.not_offered, {}, made.addresses, landed)
        if plan.store is not None:
            assert self.store is not None
            self.store.run(plan.store)
        for source, target in plan.copies:
            self.pool.pages[target] = list(self.pool.pages[source])
        self._chunks(plan, result.failed)
        return through_wire(result)

    def _chunks(self, plan: PrefillPlan, failed: dict[int, str]) -> None:
        if not plan.chunks:
            return
        rows, length = plan.shape
        assert plan.shape in self.shapes
        assert len(plan.chunks) <= rows
        written: set[int] = set()
        for chunk in plan.chunks:
            assert 0 < len(chunk.tokens) <= length
            first, last = chunk.start, chunk.start + len(chunk.tokens) - 1
            page_size = self.pool.page_size
            own = set(chunk.pages[first // page_size : last // page_size + 1])
            assert written.isdisjoint(chunk.pages), "rows of a call depend on each other"
            written |= own
            self._chunk(plan.weights, chunk, failed)

    def _chunk(self, weights: str, chunk: Chunk, failed: dict[int, str]) -> None:
        writer = prefill_writer(weights, self._root_of(chunk.id))
        if self.failures:
            self.failures -= 1
            failed[chunk.id] = "the chunk has failed"
            for position in range(chunk.start, chunk.start + len(chunk.tokens), 2):
                self.pool.write(chunk.pages, position, -2)
            return
        self.pool.extend(chunk.pages, chunk.start, chunk.tokens, writer)


class SymbolicDecode:
    """Carries out decode plans; computes when a plan is begun, in the order of a device."""

    def __init__(self, connector: SymbolicConnector, config: DecodeConfig):
        self.connector, self.pool, self.config = connector, connector.pool, config
        self._slots: dict[int, tuple[Admit, list[int]]] = {}
        self.pulls = Pulls(connector)
        self._dispatched: deque[tuple[DecodePlan, DecodeResult]] = deque()

    def own(self) -> None:
        """See `DecodeRuns`."""

    def forget(self, group: str) -> None:
        """See `DecodeRuns`."""

    @property
    def num_dispatched(self) -> int:
        """See `DecodeRuns`."""
        return len(self._dispatched)

    def offer(self, offers: Sequence[Offer]) -> PrefillResult:
        """See `DecodeRuns`."""
        return through_wire(make_offers(self.connector, offers))

    def begin(self, plan: DecodePlan) -> list[Landed]:
        """See `DecodeRuns`."""
        plan = through_wire(plan)
        landed = self.pulls.run(plan.cancelled, plan.pulls)
        for admit in plan.admits:
            assert admit.slot < self.config.max_num_seqs
            self._slots[admit.slot] = admit, list(admit.tokens)
        if plan.replay is not None:
            replay = plan.replay
            assert replay.bucket in self.config.replay_buckets
            assert 0 < len(replay.tokens) <= replay.bucket
            writer = module(replay.group, replay.adapter)
            self.pool.extend(replay.pages, replay.start, replay.tokens, writer)
        if plan.step is not None:
            self._dispatched.append((plan, self._step(plan)))
        return [through_wire(one) for one in landed]

    def finish(self) -> tuple[DecodePlan, DecodeResult]:
        """See `DecodeRuns`."""
        plan, result = self._dispatched.popleft()
        return plan, through_wire(result)

    def _step(self, plan: DecodePlan) -> DecodeResult:
        step = plan.step
        assert step is not None
        assert step.bucket in self.config.batch_buckets
        assert len({row.slot for row in step.rows}) == len(step.rows) <= step.bucket
        assert 1 <= step.count <= self.config.steps_per_dispatch
        tokens: list[list[int]] = []
        for row in step.rows:
            admit, known = self._slots[row.slot]
            assert admit.id == row.id
            first, last = row.start, row.start + step.count - 1
            written = row.pages[first // self.pool.page_size : last // self.pool.page_size + 1]
            others = {page for other in step.rows if other is not row for page in other.pages}
            assert others.isdisjoint(written), "a row writes to a page that another one reads"
            writer = module(step.group, row.adapter)
            forces = admit.params.grammar is not None
            assert step.count == 1 or not forces
            if forces and first + 1 < len(known):
                # What this step gives was told with an earlier one.
                self.pool.extend(row.pages, first, [known[first]], writer)
                tokens.append([])
                continue
            for position in range(first, last + 1):
                self.pool.extend(row.pages, position, [known[position]], writer)
                sampled = next_token(writer, self.pool.read(row.pages, position + 1))
                known[position + 1 :] = [sampled]
            known += forced_after(known[-1]) if forces else []
            tokens.append(known[first + 1 :])
        wanted = [self._slots[row.slot][0].params.logprobs is not None for row in step.rows]
        logprobs = (
            [[TokenLogprobs(-float(t)) for t in row] for row in tokens] if any(wanted) else []
        )
        return DecodeResult(plan.number, tokens, logprobs)
