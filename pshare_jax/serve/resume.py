"""Streams that another frontend goes on with: event ids, and what a client says that it has got.

A client whose frontend has died sends the same request again, to any other, with the header
`Last-Event-ID`. Nothing has to be remembered of the request: everything that its answer depends on
is in the body, and the seed, where the body has none, is made from the answer's id, which is a part
of each event's id. So the answer is generated again, and what the client has is left out. For that
the events of a choice are made token by token: they do not depend on how many tokens came at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import secrets
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from pshare_jax.core.requests import RequestOutput
from pshare_jax.serve.errors import ApiError
from pshare_jax.serve.formats import Heading

if TYPE_CHECKING:
    from pshare_jax.serve.generate import Job

HEADER = "Last-Event-ID"

MAX_CHOICES = 16
"""Streams of more choices have no event ids."""

_EVENT_ID = re.compile(
    r"(?P<id>(?:cmpl|chatcmpl)-[0-9a-f]{32})\.(?P<created>\d{1,12})\.(?P<digest>[0-9a-f]{16})"
    r"\.(?P<counts>\d{1,9}(?:-\d{1,9})*)"
)
_CLOSING = -1


class StreamPosition:
    """How far a stream has got, and what of it the client has already.

    Args:
        heading: of the answer.
        digest: of the request.
        sent: events of each choice, and at the end of the closing, that the client has.
    """

    def __init__(self, heading: Heading, digest: str, sent: Sequence[int]):
        self._start = f"{heading.id}.{heading.created}.{digest}."
        self._sent = list(sent)
        self._made = [0] * len(sent)

    def next(self, index: int = _CLOSING) -> str | None:
        """The id of the next event of a choice, or of the closing; None if the client has it."""
        self._made[index] += 1
        if self._made[index] <= self._sent[index]:
            return None
        self._sent[index] = self._made[index]
        return self._start + "-".join(map(str, self._sent))


def resumable(request: web.Request, job: Job) -> tuple[Job, StreamPosition | None]:
    """The job so that another frontend could go on with it, and where its stream begins.

    Raises:
        ApiError: the client goes on with the stream of another request (409), or names no event
            (400).
    """
    heading = job.format.heading
    choices = len(job.prompts) * job.output.best_of
    if not heading.id.startswith(("cmpl-", "chatcmpl-")) or choices > MAX_CHOICES:
        return job, None
    digest = _digest(job)
    sent, again = [0] * (choices + 1), ""
    if (last := request.headers.get(HEADER)) is not None:
        found = _EVENT_ID.fullmatch(last)
        counts = [int(count) for count in found["counts"].split("-")] if found else []
        if found is None or len(counts) > MAX_CHOICES + 1:
            raise ApiError(400, f"{HEADER} is not the id of an event of this server")
        prefix = heading.id.partition("-")[0]
        if found["digest"] != digest or len(counts) != len(sent) or not last.startswith(prefix):
            raise ApiError(409, f"{HEADER} belongs to another request: send the same body again")
        sent, again = counts, f"-{secrets.token_hex(4)}"
        heading = dataclasses.replace(heading, id=found["id"], created=int(found["created"]))
        job.format.heading = heading
    sampling = [
        params
        if params.seed is not None
        else msgspec.structs.replace(params, seed=_seed(heading.id, number))
        for number, params in enumerate(job.sampling)
    ]
    job = dataclasses.replace(job, sampling=sampling, stepwise=True, again=again)
    return job, StreamPosition(heading, digest, sent)


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


def _digest(job: Job) -> str:
    """Of all that an answer depends on."""
    facts = (job.model, [p.token_ids for p in job.prompts], job.sampling, str(job.output))
    return hashlib.blake2b(msgspec.json.encode(facts), digest_size=8).hexdigest()


def _seed(answer: str, prompt: int) -> int:
    digest = hashlib.blake2b(f"{answer}/{prompt}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")
