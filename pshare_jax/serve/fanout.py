"""`POST /v1/fanout`: one chat for several models at once, over one context.

The models' prompts come together, so what they share is computed once. Each model answers as in
`/v1/chat/completions`, labelled by its name; one that fails does not end the others.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from aiohttp import web
from msgspec import structs

from pshare_jax.core.requests import RequestTimes, Session
from pshare_jax.errors import RequestError
from pshare_jax.frontend.requests import ChatRequest, FanoutRequest
from pshare_jax.serve.access import KEY
from pshare_jax.serve.access_log import REPORT
from pshare_jax.serve.chat_format import ChatFormat
from pshare_jax.serve.chat_plan import plan_chat
from pshare_jax.serve.errors import ApiError, as_api_error
from pshare_jax.serve.formats import DONE, Event, Heading, encode_answer, heading, part_id
from pshare_jax.serve.generate import (
    Job,
    Run,
    add_event,
    check_count,
    generating,
    told,
    write_failure,
    write_stream,
)
from pshare_jax.serve.offload import is_large
from pshare_jax.serve.parsing import read_request
from pshare_jax.serve.protocol import FanoutAnswer, PromptTokensDetails, Usage
from pshare_jax.serve.resume import StreamPart, repeatable, resumption, slots_of
from pshare_jax.serve.service import REQUEST_ID, SERVICE, Service
from pshare_jax.serve.sessions import session_of
from pshare_jax.serve.sse import EventStream

T = TypeVar("T")


class _BranchFormat(ChatFormat):
    """One model's part of the answer: no end of the stream, and errors that name the model."""

    def closing(self, usage: Usage) -> Sequence[Event]:
        """The usage if it was asked for."""
        return [event for event in super().closing(usage) if event is not DONE]

    def failure(self, error: ApiError) -> Sequence[Event]:
        """The error object, labelled."""
        return [_labelled(self.heading.model, error)]


@dataclass(frozen=True)
class _Branch:
    """One model: its job, or why there is none."""

    model: str
    plan: Job | ApiError


class _Fan:
    """The jobs of one request while they run, and what the access log says of them."""

    def __init__(self, request: web.Request, session: Session, id: str):
        self._service = request.app[SERVICE]
        self._key = request[KEY]
        self._session = session
        self._id = id
        self._runs: list[Run] = []

    @asynccontextmanager
    async def generating(self, job: Job) -> AsyncGenerator[Run]:
        """One of the jobs while it runs; to the engine all of them are one request."""
        requests = [
            structs.replace(request, owner=structs.replace(request.owner, request=self._id))
            for request in job.requests(self._key, self._session)
        ]
        async with generating(self._service, self._key, job, requests) as run:
            self._runs.append(run)
            yield run

    def facts(self) -> dict[str, Any]:
        """What the access log says: names and sums."""
        facts = [run.facts() for run in self._runs]
        firsts = [f["ttft_seconds"] for f in facts if f["ttft_seconds"] is not None]
        sums = ("prompt_tokens", "cached_tokens", "completion_tokens")
        return {
            "model": ", ".join(f["model"] for f in facts),
            "stream": any(f["stream"] for f in facts),
            **{name: sum(f[name] for f in facts) for name in sums},
            "ttft_seconds": min(firsts, default=None),
            "finish_reasons": sorted({reason for f in facts for reason in f["finish_reasons"]}),
        }

    def times(self) -> list[tuple[RequestTimes, float]]:
        """When each sequence that has ended came to which stage, and when it ended."""
        return [stages for run in self._runs for stages in run.times()]


async def fan_out(request: web.Request) -> web.StreamResponse:
    """`POST /v1/fanout`."""
    arrival = time.monotonic()
    service = request.app[SERVICE]
    service.require_serving()
    body = await read_request(request, FanoutRequest)
    names = _names(body, service)
    session = session_of(request, service, body)
    large = is_large(request)
    branches = await _all(_branch(service, body.of(name), large, arrival) for name in names)
    jobs = [branch.plan for branch in branches if isinstance(branch.plan, Job)]
    if not jobs:
        # Then there is no answer that it would be a part of.
        raise next(branch.plan for branch in branches if isinstance(branch.plan, ApiError))
    check_count(service, jobs)
    head = heading("fanout", "", jobs[0].output.include_usage)
    if jobs[0].output.stream:
        return await _stream(request, session, branches, head)
    request.setdefault(REQUEST_ID, head.id)
    fan = request[REPORT] = _Fan(request, session, head.id)
    parts = await _all(_whole(fan, branch) for branch in branches)
    usage = _total([usage for _, usage in parts])
    answer = FanoutAnswer(head.id, "fanout", head.created, [part for part, _ in parts], usage)
    return web.Response(body=msgspec.json.encode(answer), content_type="application/json")


def _names(body: FanoutRequest, service: Service) -> list[str]:
    most = service.config.max_fanout
    if not 1 <= len(body.model) <= most:
        raise RequestError(
            f"model must list 1 .. {most} models (server.max_fanout), got {len(body.model)}",
            param="model",
        )
    names = [service.canonical(name) for name in body.model]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise RequestError(
            f"model lists {twice[0][:100]!r} more than once; use n for samples", param="model"
        )
    return names


async def _branch(service: Service, body: ChatRequest, large: bool, arrival: float) -> _Branch:
    try:
        body.model = service.served_name(body.model)
        plan = await plan_chat(service, body, large)
    except Exception as error:
        api_error = as_api_error(error)
        if api_error is None:
            raise
        return _Branch(body.model, api_error)
    spelling = _BranchFormat(
        heading("chatcmpl", body.model, plan.output.include_usage),
        service.tokenizer,
        plan.output.logprobs,
        plan.new_reader,
        plan.call_id,
        plan.prompt.token_ids if plan.output.token_ids else None,
        legacy=bool(body.functions),
        scored_ids=plan.prompt.token_ids,
        prompt_logprobs=plan.output.prompt_logprobs,
    )
    return _Branch(body.model, plan.job(spelling, arrival))


async def _all(parts: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results of coroutines that run at once; when one raises, the others are ended first."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _whole(fan: _Fan, branch: _Branch) -> tuple[msgspec.Raw, Usage | None]:
    """One model's answer, or an object that says why there is none."""
    job = branch.plan
    if isinstance(job, ApiError):
        return _raw(_labelled(branch.model, job)), None
    try:
        async with fan.generating(job) as run:
            async for _ in run.progress():
                pass
            chosen, usage = run.chosen(), run.usage()
            answer = job.format.answer([s.take() for s in chosen], chosen, usage)
            return msgspec.Raw(encode_answer(answer)), usage
    except Exception as error:
        return _raw(_labelled(branch.model, told(error, job))), None


async def _stream(
    request: web.Request, session: Session, branches: Sequence[_Branch], head: Heading
) -> web.StreamResponse:
    config = request.app[SERVICE].config
    head, branches, parts = _placed(request, branches, head)
    request.setdefault(REQUEST_ID, head.id)
    fan = request[REPORT] = _Fan(request, session, head.id)
    stream, ping_seconds = EventStream(request, config.write_timeout_seconds), config.ping_seconds
    await stream.open()
    usages = await _all(
        _branch_stream(fan, branch, stream, ping_seconds, part)
        for branch, part in zip(branches, parts, strict=False)
    )
    closing = [DONE]
    if head.stream_usage:
        usage = FanoutAnswer(head.id, "fanout.usage", head.created, [], _total(usages))
        closing.insert(0, msgspec.json.encode(usage))
    for event in closing:
        add_event(stream, event, parts[-1])
    await stream.flush()
    return stream.response


def _placed(
    request: web.Request, branches: Sequence[_Branch], head: Heading
) -> tuple[Heading, list[_Branch], list[StreamPart | None]]:
    """The heading and the branches so that another frontend could go on with their stream.

    Where in the stream each of them begins, and at last what closes it; see `resume`.

    Raises:
        ApiError: see `resume.resumption`.
    """
    plans = [branch.plan for branch in branches]
    slots = [1 if isinstance(plan, ApiError) else slots_of(plan) for plan in plans]
    found = resumption(request, head, plans, sum(slots) + 1)
    placed: list[_Branch] = []
    for number, branch in enumerate(branches):
        plan = branch.plan
        if found is not None and isinstance(plan, Job):
            id = f"chatcmpl-{part_id(found.heading.id, number)}"
            created = found.heading.created
            plan.format.heading = dataclasses.replace(plan.format.heading, id=id, created=created)
            plan = repeatable(plan, found.again)
        placed.append(_Branch(branch.model, plan))
    if found is None:
        return head, placed, [None] * (len(slots) + 1)
    starts = itertools.accumulate(slots, initial=0)
    counts = [*(count - 1 for count in slots), 0]
    places = [found.position.part(*place) for place in zip(starts, counts, strict=True)]
    return found.heading, placed, [*places]


async def _branch_stream(
    fan: _Fan,
    branch: _Branch,
    stream: EventStream,
    ping_seconds: float,
    position: StreamPart | None,
) -> Usage | None:
    job = branch.plan
    if isinstance(job, ApiError):
        add_event(stream, _labelled(branch.model, job), position)
        return None
    try:
        async with fan.generating(job) as run:
            await write_stream(stream, job, run, ping_seconds or None, position)
            return run.usage()
    except ConnectionError:
        raise
    except Exception as error:
        await write_failure(stream, job, told(error, job))
        return None


def _labelled(model: str, error: ApiError) -> dict[str, Any]:
    return {"model": model, "error": error.as_dict()}


def _raw(part: dict[str, Any]) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(part))


def _total(usages: Sequence[Usage | None]) -> Usage:
    """Usage of all models together."""
    known = [usage for usage in usages if usage is not None]
    details = [usage.prompt_tokens_details for usage in known]
    return Usage(
        sum(usage.prompt_tokens for usage in known),
        sum(usage.completion_tokens for usage in known),
        sum(usage.total_tokens for usage in known),
        PromptTokensDetails(
            sum(detail.cached_tokens for detail in details),
            sum(detail.shared_tokens for detail in details),
        ),
    )
