"""OpenAI's generation endpoints: from an HTTP request to a `Job`."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
from aiohttp import web

from pshare_jax.frontend.chat import Prompt, completion_prompts
from pshare_jax.frontend.constraints import asked_grammar
from pshare_jax.frontend.params import (
    check_scored,
    output_params,
    request_priority,
    resolve_max_tokens,
    sampling_params,
)
from pshare_jax.frontend.requests import ChatRequest, CompletionRequest
from pshare_jax.serve.chat_format import ChatFormat
from pshare_jax.serve.chat_plan import plan_chat
from pshare_jax.serve.formats import CompletionFormat, heading
from pshare_jax.serve.generate import Job, respond
from pshare_jax.serve.offload import is_large
from pshare_jax.serve.parsing import read_request
from pshare_jax.serve.restrictions import restricted
from pshare_jax.serve.service import SERVICE
from pshare_jax.text.tokenizer import Tokenizer

DEFAULT_COMPLETION_TOKENS = 16


async def completions(request: web.Request) -> web.StreamResponse:
    """`POST /v1/completions`."""
    arrival = time.monotonic()
    service = request.app[SERVICE]
    service.require_serving()
    body = await read_request(request, CompletionRequest)
    body.model = service.served_name(body.model)
    output = output_params(body, service.limits.max_n)
    # Checked before the work of tokenising, for one token; each prompt then gets its own number.
    template = sampling_params(body, service.limits, 1, output.logprobs, service.sampling_defaults)
    large = is_large(request)
    prompts = await service.offload.run_if(
        large, completion_prompts, body, service.tokenizer, service.limits
    )
    grammar = asked_grammar(body, service.grammar_limits)
    sampling = [
        msgspec.structs.replace(
            template,
            max_tokens=resolve_max_tokens(
                body.max_tokens,
                DEFAULT_COMPLETION_TOKENS,
                len(prompt.token_ids),
                service.limits,
                "prompt",
                output.least_tokens,
            ),
        )
        for prompt in prompts
    ]
    sampling = await restricted(service, sampling, body, grammar)
    check_scored(output, sum(len(prompt.token_ids) for prompt in prompts), service.limits)
    echoes = [""] * (len(prompts) * output.n)
    if output.echo:
        texts = await service.offload.run_if(
            large, _prompt_texts, prompts, service.tokenizer, output.skip_special_tokens
        )
        echoes = [text for text in texts for _ in range(output.n)]
    job = Job(
        model=body.model,
        prompts=prompts,
        sampling=sampling,
        output=output,
        cache_salt=body.cache_salt or "",
        format=CompletionFormat(
            heading("cmpl", body.model, output.include_usage),
            service.tokenizer,
            output,
            echoes,
            [prompt.token_ids for prompt in prompts for _ in range(output.n)],
        ),
        arrival=arrival,
        hints=body,
        priority=request_priority(body),
    )
    return await respond(request, service, job)


def _prompt_texts(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, skip_special_tokens: bool
) -> list[str]:
    return [
        tokenizer.decode(prompt.token_ids, skip_special_tokens)
        if prompt.text is None
        else prompt.text
        for prompt in prompts
    ]


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """`POST /v1/chat/completions`."""
    arrival = time.monotonic()
    service = request.app[SERVICE]
    service.require_serving()
    body = await read_request(request, ChatRequest)
    body.model = service.served_name(body.model)
    plan = await plan_chat(service, body, is_large(request))
    chat_format = ChatFormat(
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
    return await respond(request, service, plan.job(chat_format, arrival))
