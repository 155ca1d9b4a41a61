"""Runs one generation request: submits its sequences and answers, whole or as a stream."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from aiohttp import web

from pshare_jax.core.requests import (
    FinishReason,
    Owner,
    Request,
    RequestTimes,
    SamplingParams,
    Session,
)
from pshare_jax.frontend.chat import Prompt
from pshare_jax.frontend.output import SequenceOutput
from pshare_jax.frontend.params import OutputParams, sample_seed
from pshare_jax.frontend.requests import SessionHints
from pshare_jax.serve.access import KEY
from pshare_jax.serve.access_log import REPORT
from pshare_jax.serve.api_keys import ApiKey
from pshare_jax.serve.errors import ApiError, as_api_error
from pshare_jax.serve.events import Event, Generation
from pshare_jax.serve.formats import Event as StreamEvent
from pshare_jax.serve.formats import Format, encode_answer, with_usage
from pshare_jax.serve.metrics import SequenceTimer
from pshare_jax.serve.protocol import Usage
from pshare_jax.serve.resume import StreamPart, resumable, single_tokens
from pshare_jax.serve.service import REQUEST_ID, Service
from pshare_jax.serve.sessions import session_of
from pshare_jax.serve.sse import EventStream
from pshare_jax.serve.turns import Turn
from pshare_jax.serve.usage import total_usage

log = logging.getLogger(__name__)

# Tokens and alternatives of an answer that is put together beside the event loop.
LONG_ANSWER = 1000


@dataclass(frozen=True)
class Job:
    """A checked request: what to generate, and how to answer.

    Sequence i is sample `i % best_of` of prompt `i // best_of`. `arrival` is in seconds of
    `time.monotonic`. `hints` are what the client says of calls to come. A job that is `stepwise`
    is answered token by token; `again` tells its sequences from those of the same answer before.
    """

    model: str
    prompts: Sequence[Prompt]
    sampling: Sequence[SamplingParams]
    output: OutputParams
    cache_salt: str
    format: Format
    arrival: float
    hints: SessionHints
    priority: int = 0
    stepwise: bool = False
    again: str = ""

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, each counted once."""
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    @property
    def most_generated(self) -> int:
        """Tokens that all samples together may have."""
        return self.output.best_of * sum(params.max_tokens for params in self.sampling)

    def requests(self, key: ApiKey, session: Session) -> list[Request]:
        """One engine request for each sequence; sample i has the seed `seed + i`.

        The first sample of a prompt brings its scores, if they are asked for. Of several samples
        nobody can say which one the next prompt goes on from.
        """
        samples = self.output.best_of
        owner = Owner(key.name, key.weight, self.format.heading.id, self.priority)
        salt = key.cache_salt(self.cache_salt)
        return [
            Request(
                id=f"{self.format.heading.id}{self.again}-{index * samples + sample}",
                model=self.model,
                prompt_token_ids=prompt.token_ids,
                params=self._params(params, sample),
                cache_salt=salt,
                owner=owner,
                session=session,
                goes_on=samples == 1,
            )
            for index, (prompt, params) in enumerate(zip(self.prompts, self.sampling, strict=True))
            for sample in range(samples)
        ]

    def _params(self, params: SamplingParams, sample: int) -> SamplingParams:
        logprobs = params.logprobs
        if self.output.best_of > self.output.n and logprobs is None:
            logprobs = 0  # they are ranked by these
        return msgspec.structs.replace(
            params,
            seed=sample_seed(params.seed, sample),
            logprobs=logprobs,
            prompt_logprobs=None if sample else self.output.prompt_scores,
        )


class Run:
    """The choices of a job while they are being generated."""

    def __init__(self, service: Service, job: Job, generation: Generation):
        self._service = service
        self._job = job
        self._generation = generation
        prompts = [prompt for prompt in job.prompts for _ in range(job.output.best_of)]
        tokenizer = service.tokenizer_of(job.model)
        self.sequences = [SequenceOutput(tokenizer, job.output) for _ in prompts]
        self._timers: list[SequenceTimer] = [
            service.metrics.timer(job.model, job.arrival, len(prompt.token_ids))
            for prompt in prompts
        ]

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        for sequence, timer in zip(self.sequences, self._timers, strict=True):
            if sequence.finish_reason is None:
                timer.end(FinishReason.ABORT, sequence.completion_tokens, time.monotonic())

    async def progress(self, patience: float | None = None) -> AsyncIterator[list[int]]:
        """The choices that have got something new, batch by batch, until all have ended.

        None at all, if nothing has come for `patience` seconds.

        Raises:
            GenerationError, EngineDeadError, ApiError: the engine gave a sequence up.
        """
        turn = Turn()
        async for events in self._generation.batches(patience):
            for event in events:
                if not self._job.stepwise:
                    self._feed(event)
                else:
                    for output in single_tokens(event.output):
                        if self.sequences[event.index].finish_reason is None:
                            self._feed(replace(event, output=output))
                            yield [event.index]
                await turn.pause()
            if not (self._job.stepwise and events):
                yield sorted({event.index for event in events})

    @property
    def completion_tokens(self) -> int:
        """Generated so far."""
        return sum(sequence.completion_tokens for sequence in self.sequences)

    @property
    def is_long(self) -> bool:
        """Whether it takes its time to write the answer."""
        output = self._job.output
        scores = sum(len(sequence.prompt_logprobs or ()) for sequence in self.sequences)
        listed = self.completion_tokens * (1 + (output.logprobs or 0))
        return listed + scores * (1 + (output.prompt_scores or 0)) > LONG_ANSWER

    def usage(self) -> Usage:
        """Tokens of the whole job."""
        lengths = [len(prompt.token_ids) for prompt in self._job.prompts]
        return total_usage(self.sequences, self._job.output.best_of, lengths)

    def chosen(self) -> list[SequenceOutput]:
        """The sequences that are answered: of each prompt the `n` likeliest, best first."""
        n, samples = self._job.output.n, self._job.output.best_of
        chosen: list[SequenceOutput] = []
        for start in range(0, len(self.sequences), samples):
            candidates = self.sequences[start : start + samples]
            for sequence in candidates:
                sequence.prompt_logprobs = candidates[0].prompt_logprobs
            if samples > n:
                candidates = sorted(candidates, key=lambda s: s.mean_logprob, reverse=True)
            chosen += candidates[:n]
        return chosen

    def facts(self) -> dict[str, Any]:
        """What the access log says of the job so far; `ttft_seconds` is its first token's time."""
        usage = self.usage()
        firsts = [t.first_token for t in self._timers if t.first_token is not None]
        return {
            "model": self._job.model,
            "stream": bool(self._job.output.stream),
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.prompt_tokens_details.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "ttft_seconds": round(min(firsts), 6) if firsts else None,
            "finish_reasons": sorted({_reason(s) for s in self.sequences}),
        }

    def times(self) -> list[tuple[RequestTimes, float]]:
        """When each sequence that has ended came to which stage, and when it ended."""
        return [timer.stages for timer in self._timers if timer.stages is not None]

    def _feed(self, event: Event) -> None:
        sequence, timer = self.sequences[event.index], self._timers[event.index]
        if sequence.finish_reason is not None:
            return
        timer.tokens(event.output, event.time)
        sequence.feed(event.output)
        if sequence.finish_reason is None:
            return
        timer.end(sequence.finish_reason, sequence.completion_tokens, event.time)
        if sequence.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            raise self._service.failure(sequence.error)
        # A stop string is found here; the engine would go on.
        self._generation.abort(event.index, complete=True)


def _reason(sequence: SequenceOutput) -> str:
    return (sequence.finish_reason or FinishReason.ABORT).value


async def respond(request: web.Request, service: Service, job: Job) -> web.StreamResponse:
    """Generates and answers.

    Raises:
        PshareError, ApiError, GenerationError: nothing was sent yet, and this is why.
        ConnectionError: the client has gone.
    """
    check_count(service, [job])
    key = request[KEY]
    position = None
    if job.output.stream:
        job, position = resumable(request, job)
    requests = job.requests(key, session_of(request, service, job.hints))
    request.setdefault(REQUEST_ID, job.format.heading.id)
    async with generating(service, key, job, requests) as run:
        request[REPORT] = run
        return await _answer(request, service, job, run, position)


@asynccontextmanager
async def generating(
    service: Service, key: ApiKey, job: Job, requests: Sequence[Request]
) -> AsyncGenerator[Run]:
    """A job while its choices are generated; what it takes is charged to the key.

    Raises:
        PshareError, ApiError: it was not begun.
    """
    with service.access.account(key).charge(job.prompt_tokens, job.most_generated) as charge:
        async with service.generation(requests) as generation:
            with (
                Run(service, job, generation) as run,
                service.sessions.call(requests[0], run.usage),
            ):
                charge.started = True
                try:
                    yield run
                finally:
                    charge.generated = run.completion_tokens


def check_count(service: Service, jobs: Sequence[Job]) -> None:
    """Raises ApiError (400) for jobs of more sequences than the engine can hold together."""
    output = jobs[0].output
    samples = output.best_of
    count = sum(len(job.prompts) for job in jobs) * samples
    if count <= service.max_sequences:
        return
    name = "n" if samples == output.n else "best_of"
    what = f"{len(jobs[0].prompts)} prompts" if len(jobs) == 1 else f"{len(jobs)} models"
    raise ApiError(
        400,
        f"{what} with {name} = {samples} are {count} sequences; "
        f"the server holds {service.max_sequences}",
        param=name,
    )


async def _answer(
    request: web.Request, service: Service, job: Job, run: Run, position: StreamPart | None
) -> web.StreamResponse:
    if not job.output.stream:
        async for _ in run.progress():
            pass
        if run.is_long:
            body = await service.offload.run(False, _whole, job, run)
        else:
            body = _whole(job, run)
        return web.Response(body=body, content_type="application/json")
    stream = EventStream(request, service.config.write_timeout_seconds, job.format.named_events)
    await stream.open()
    try:
        await write_stream(stream, job, run, service.config.ping_seconds or None, position)
    except (asyncio.CancelledError, ConnectionError):
        raise
    except Exception as error:  # the status is sent: what is left is an event that says so
        await write_failure(stream, job, told(error, job))
    return stream.response


def told(error: Exception, job: Job) -> ApiError:
    """What the client is told; a bug is logged."""
    api_error = as_api_error(error)
    if api_error is None:
        log.error("a bug while answering %s", job.format.heading.id, exc_info=error)
        api_error = ApiError(500, "internal error")
    return api_error


async def write_failure(stream: EventStream, job: Job, error: ApiError) -> None:
    """Says in a stream that a job has failed, and why."""
    for event in job.format.failure(error):
        stream.add(event)
    await stream.flush()


def _whole(job: Job, run: Run) -> bytes:
    chosen = run.chosen()
    pieces = [sequence.take() for sequence in chosen]
    return encode_answer(job.format.answer(pieces, chosen, run.usage()))


async def write_stream(
    stream: EventStream,
    job: Job,
    run: Run,
    ping_seconds: float | None,
    position: StreamPart | None = None,
) -> None:
    """Writes a job's answer piece by piece; others may write to the stream meanwhile.

    With a position, events have ids, and those that the client has already are left out.
    """
    opened: set[int] = set()
    turn = Turn()
    async for indices in run.progress(ping_seconds):
        if not indices:
            stream.add_comment()
        usage = run.usage() if job.output.usage_so_far else None
        for index in indices:
            sequence = run.sequences[index]
            if index not in opened:
                opened.add(index)
                for event in job.format.opening(index, run.usage()):
                    add_event(stream, with_usage(event, usage), position, index)
            piece = sequence.take()
            ids = job.output.token_ids and piece.token_ids
            events: Sequence[StreamEvent] = []
            if piece.text or piece.tokens or ids or sequence.finish_reason is not None:
                events = job.format.chunk(index, piece, sequence)
            for event in events:
                add_event(stream, with_usage(event, usage), position, index)
            await turn.pause()
        await stream.flush()
    for event in job.format.closing(run.usage()):
        add_event(stream, event, position)
    await stream.flush()


def add_event(
    stream: EventStream, event: StreamEvent, position: StreamPart | None, *choice: int
) -> None:
    """Adds an event of a choice, or of the closing, unless the client has it already."""
    if position is None:
        stream.add(event)
    elif (id := position.next(*choice)) is not None:
        stream.add(event, id)
