"""Streams that another frontend goes on with: event ids, and what a client says that it has got.

A client whose frontend has died sends the same request again, to any other, with the header
`Last-Event-ID`. Nothing has to be remembered of the request: everything that its answer depends on
is in the body, and the seed, where the body has none, is made from the answer's id, which is a part
of each event's id. So the answer is generated again, and what the client has is left out. For that
the events of a choice are made token by token: they do not depend on how many tokens came at once.
What else is random in an answer, such as the ids of calls, is made from its id as well.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import re
import secrets
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from pshare_jax.core.requests import RequestOutput
from pshare_jax.serve.errors import ApiError
from pshare_jax.serve.formats import Heading
from pshare_jax.serve.service import SERVICE, Service

if TYPE_CHECKING:
    from pshare_jax.serve.generate import Job

HEADER = "Last-Event-ID"

MAX_SLOTS = 2048
"""Streams of more choices have no event ids, which would be too long for a header."""

_EVENT_ID = re.compile(
    r"(?P<id>(?P<kind>cmpl|chatcmpl|resp|msg|fanout)-[0-9a-f]{32})\.(?P<created>\d{1,12})"
    r"\.(?P<digest>[0-9a-f]{16})\.(?P<counts>[A-Za-z0-9_-]{1,7000})"
)


class StreamPosition:
    """How far a stream has got, and what of it the client has already.

    Args:
        heading: of the answer.
        digest: of the request.
        sent: events that the client has, of each slot: a choice, or what closes several of them.
    """

    def __init__(self, heading: Heading, digest: str, sent: Sequence[int]):
        self._start = f"{heading.id}.{heading.created}.{digest}."
        self._sent = array("I", sent)
        self._made = [0] * len(sent)

    def next(self, slot: int) -> str | None:
        """The id of the next event of a slot; None if the client has it."""
        self._made[slot] += 1
        if self._made[slot] <= self._sent[slot]:
            return None
        self._sent[slot] = self._made[slot]
        return self._start + _packed(self._sent)

    def part(self, first: int, choices: int) -> StreamPart:
        """That of choices, whose slots begin with `first`, and of what closes them."""
        return StreamPart(self, first, choices)


@dataclass(frozen=True)
class StreamPart:
    """What of a stream's position belongs to one job."""

    position: StreamPosition
    first: int
    choices: int

    def next(self, choice: int | None = None) -> str | None:
        """The id of the next event of a choice, or of the closing; None if the client has it."""
        return self.position.next(self.first + (self.choices if choice is None else choice))


@dataclass(frozen=True)
class Resumption:
    """Where a stream begins: its `heading`, and which events have ids and are left out.

    `again` tells the sequences that are generated from those of the same answer before.
    """

    heading: Heading
    position: StreamPosition
    again: str


def slots_of(job: Job) -> int:
    """Slots of a job in a position: its choices, and its closing."""
    return len(job.prompts) * job.output.best_of + 1


def resumption(
    request: web.Request, heading: Heading, jobs: Sequence[Job | ApiError], slots: int
) -> Resumption | None:
    """How a stream is to be answered so that another frontend could go on with it.

    Args:
        request: of the client.
        heading: of a new answer.
        jobs: whose answers are in the stream, or why there is none.
        slots: of all of them, and of what closes the stream if that is apart.

    Returns:
        None for streams that have no event ids.

    Raises:
        ApiError: the client goes on with the stream of another request (409), or names no event
            (400).
    """
    service = request.app[SERVICE]
    if not service.resumable or slots > MAX_SLOTS:
        return None
    digest = _digest(service, jobs)
    last = request.headers.get(HEADER)
    if last is None:
        return Resumption(heading, StreamPosition(heading, digest, [0] * slots), "")
    found = _EVENT_ID.fullmatch(last)
    sent = _unpacked(found["counts"]) if found else None
    if found is None or sent is None:
        raise ApiError(400, f"{HEADER} is not the id of an event of this server")
    kind = heading.id.partition("-")[0]
    if found["digest"] != digest or len(sent) != slots or found["kind"] != kind:
        raise ApiError(
            409,
            f"{HEADER} belongs to another request: send the same body again; or the model has "
            "been replaced since, whose answer cannot be gone on with",
        )
    heading = dataclasses.replace(heading, id=found["id"], created=int(found["created"]))
    return Resumption(heading, StreamPosition(heading, digest, sent), f"-{secrets.token_hex(4)}")


def repeatable(job: Job, again: str) -> Job:
    """The job so that it gives the same events whenever it is generated, for its heading's id."""
    answer = job.format.heading.id
    sampling = [
        params
        if params.seed is not None
        else msgspec.structs.replace(params, seed=_seed(answer, number))
        for number, params in enumerate(job.sampling)
    ]
    return dataclasses.replace(job, sampling=sampling, stepwise=True, again=again)


def resumable(request: web.Request, job: Job) -> tuple[Job, StreamPart | None]:
    """A job that is a whole stream, so that another frontend could go on with it.

    Raises:
        ApiError: see `resumption`.
    """
    slots = slots_of(job)
    found = resumption(request, job.format.heading, [job], slots)
    if found is None:
        return job, None
    job.format.heading = found.heading
    return repeatable(job, found.again), found.position.part(0, slots - 1)


def single_tokens(output: RequestOutput) -> Iterator[RequestOutput]:
    """An event as events of one token each; what ends the sequence is in the last."""
    count = len(output.token_ids)
    if count < 2:
        yield output
        return
    for i, token_id in enumerate(output.token_ids):
        is_last = i == count - 1
        yield msgspec.structs.replace(
            output,
            token_ids=(token_id,),
            logprobs=output.logprobs[i : i + 1],
            usage=None if i else output.usage,
            prompt_logprobs=None if i else output.prompt_logprobs,
            finish_reason=output.finish_reason if is_last else None,
            stop_token=output.stop_token if is_last else None,
        )


def _packed(counts: array[int]) -> str:
    """Counts as text: choices that get on together make it short."""
    return base64.urlsafe_b64encode(zlib.compress(counts.tobytes(), 1)).rstrip(b"=").decode()


def _unpacked(text: str) -> array[int] | None:
    """The inverse of `_packed`; None if it is not of that form."""
    counts, inflate = array("I"), zlib.decompressobj()
    try:
        packed = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        counts.frombytes(inflate.decompress(packed, (MAX_SLOTS + 1) * counts.itemsize))
    except (binascii.Error, zlib.error, ValueError):
        return None
    return counts if inflate.eof else None


def _digest(service: Service, jobs: Sequence[Job | ApiError]) -> str:
    """Of all that the answers depend on: the weights, and how their text is read, among it."""
    config = service.engine.config
    computed = [config.dtype, config.weights, config.kv_dtype]
    facts = [
        (job.status, job.message)
        if isinstance(job, ApiError)
        else (
            job.model,
            service.model(job.model).fingerprint,
            str(service.format_of(job.model)),
            [prompt.token_ids for prompt in job.prompts],
            job.sampling,
            str(job.output),
        )
        for job in jobs
    ]
    return hashlib.blake2b(msgspec.json.encode([computed, facts]), digest_size=8).hexdigest()


def _seed(answer: str, prompt: int) -> int:
    digest = hashlib.blake2b(f"{answer}/{prompt}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")
