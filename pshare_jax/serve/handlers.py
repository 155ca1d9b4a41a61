"""The generation endpoints: from an HTTP request to a `Job`."""

from __future__ import annotations

import time
import uuid

from aiohttp import web

from pshare_jax.errors import RequestError
from pshare_jax.frontend.chat import TemplateOptions, chat_prompt, completion_prompts, usable_tools
from pshare_jax.frontend.params import (
    OutputParams,
    output_params,
    resolve_max_tokens,
    sampling_params,
    with_changes,
)
from pshare_jax.frontend.requests import ChatRequest, CompletionRequest
from pshare_jax.frontend.tool_calls.parser import ToolParser
from pshare_jax.serve.chat_format import ChatFormat
from pshare_jax.serve.formats import CompletionFormat, Heading
from pshare_jax.serve.generate import Job, respond
from pshare_jax.serve.offload import INLINE_BYTES
from pshare_jax.serve.parsing import read_request
from pshare_jax.serve.service import SERVICE, Service

DEFAULT_COMPLETION_TOKENS = 16


async def completions(request: web.Request) -> web.StreamResponse:
    """`POST /v1/completions`."""
    arrival = time.monotonic()
    service = request.app[SERVICE]
    service.require_serving()
    body = await read_request(request, CompletionRequest)
    service.model(body.model)
    output = output_params(body, service.limits.max_n)
    # Checked before the work of tokenising, for one token; each prompt then gets its own number.
    template = sampling_params(body, service.limits, 1, output.logprobs)
    prompts = await service.offload.run_if(
        _is_large(body), completion_prompts, body, service.tokenizer, service.limits
    )
    sampling = [
        with_changes(
            template,
            max_tokens=resolve_max_tokens(
                body.max_tokens,
                DEFAULT_COMPLETION_TOKENS,
                len(prompt.token_ids),
                service.limits,
                "prompt",
            ),
        )
        for prompt in prompts
    ]
    echoes = [""] * (len(prompts) * output.n)
    if output.echo:
        texts = [
            service.tokenizer.decode(prompt.token_ids, output.skip_special_tokens)
            if prompt.text is None
            else prompt.text
            for prompt in prompts
        ]
        echoes = [text for text in texts for _ in range(output.n)]
    job = Job(
        model=body.model,
        prompts=prompts,
        sampling=sampling,
        output=output,
        cache_salt=body.cache_salt or "",
        format=CompletionFormat(
            heading("cmpl", body.model, output),
            service.tokenizer,
            echoes,
            output.logprobs,
            [prompt.token_ids for prompt in prompts for _ in range(output.n)]
            if output.token_ids
            else None,
        ),
        arrival=arrival,
    )
    return await respond(request, service, job)


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """`POST /v1/chat/completions`."""
    arrival = time.monotonic()
    service = request.app[SERVICE]
    service.require_serving()
    body = await read_request(request, ChatRequest)
    service.model(body.model)
    return await respond(request, service, await chat_job(service, body, arrival))


async def chat_job(service: Service, body: ChatRequest, arrival: float) -> Job:
    """What a chat asks for, checked.

    Raises:
        RequestError: what cannot be served.
    """
    model = service.formats[body.model]
    output = output_params(body, service.limits.max_n, model.markers)
    template = sampling_params(body, service.limits, 1, output.logprobs)
    tools = usable_tools(body)
    options = TemplateOptions(
        body.add_generation_prompt is not False,
        body.chat_template_kwargs,
        bool(body.add_special_tokens),
        body.truncate_prompt_tokens,
        model.tool_prompt,
    )
    prompt = await service.offload.run(
        chat_prompt, service.tokenizer, service.limits, body.messages, tools, options
    )
    max_tokens = resolve_max_tokens(
        _chat_max_tokens(body), None, len(prompt.token_ids), service.limits, "messages"
    )
    names = [tool["function"]["name"] for tool in tools]
    legacy = bool(body.functions)
    one_call = legacy or body.parallel_tool_calls is False
    return Job(
        model=body.model,
        prompts=[prompt],
        sampling=[with_changes(template, max_tokens=max_tokens)],
        output=output,
        cache_salt=body.cache_salt or "",
        format=ChatFormat(
            heading("chatcmpl", body.model, output),
            service.tokenizer,
            output.logprobs,
            lambda: model.reader(names, prompt.in_reasoning, one_call),
            ToolParser.new_call_id if model.parser is None else model.parser.new_call_id,
            prompt.token_ids if output.token_ids else None,
            legacy,
        ),
        arrival=arrival,
    )


def _is_large(body: CompletionRequest) -> bool:
    """Whether its prompts take their time to be tokenised."""
    return not isinstance(body.prompt, str) or len(body.prompt) > INLINE_BYTES


def heading(prefix: str, model: str, output: OutputParams) -> Heading:
    """A new answer's id, time and model."""
    return Heading(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model, output.include_usage)


def _chat_max_tokens(body: ChatRequest) -> float | None:
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise RequestError(
            "max_tokens and max_completion_tokens differ; give one", param="max_completion_tokens"
        )
    return old if new is None else new
