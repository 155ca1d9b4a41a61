"""OpenAI's Responses and Anthropic's Messages: other spellings of a chat."""

from __future__ import annotations

import time

from aiohttp import web

from pshare_jax.errors import RequestError
from pshare_jax.frontend import messages_api, responses_api
from pshare_jax.frontend.messages_api import CountTokensRequest, MessagesRequest
from pshare_jax.frontend.responses_api import ResponsesRequest
from pshare_jax.serve.chat_plan import chat_prompt_of, plan_chat
from pshare_jax.serve.errors import ApiError
from pshare_jax.serve.formats import heading
from pshare_jax.serve.generate import respond
from pshare_jax.serve.info import json_response
from pshare_jax.serve.messages_format import MessagesFormat
from pshare_jax.serve.offload import is_large
from pshare_jax.serve.parsing import read_request
from pshare_jax.serve.responses_format import ResponsesFormat
from pshare_jax.serve.service import SERVICE, WARNINGS


async def responses(request: web.Request) -> web.StreamResponse:
    """`POST /v1/responses`."""
    arrival = time.monotonic()
    service = request.app[SERVICE]
    service.require_serving()
    body = await read_request(request, ResponsesRequest)
    body.model = service.served_name(body.model)
    _say_ignored_tools(request, body)
    large = is_large(request)
    chat = await service.offload.run_if(large, responses_api.as_chat, body)
    try:
        plan = await plan_chat(service, chat, large)
    except RequestError as error:
        raise _in_responses_words(error) from None
    spelling = ResponsesFormat(
        heading("resp", body.model),
        body,
        plan.new_reader(),
        plan.call_id,
        service.tokenizer,
    )
    return await respond(request, service, plan.job(spelling, arrival))


def _in_responses_words(error: RequestError) -> RequestError:
    """An error that names the field as this API spells it."""
    chat, own = "response_format", "text.format"
    if error.param is None or not error.param.startswith(chat):
        return error
    words = (
        text.replace(f"{chat}.json_schema", own).replace(chat, own)
        for text in (str(error), error.param)
    )
    return RequestError(*words, code=error.code)


def _say_ignored_tools(request: web.Request, body: ResponsesRequest) -> None:
    """Agents list tools that OpenAI's servers run, and do without where there are none."""
    tools = [tool.get("type") for tool in body.tools or () if not responses_api.is_function(tool)]
    kinds = {kind[:60] if isinstance(kind, str) else "unknown" for kind in tools}
    if not kinds:
        return
    if request.app[SERVICE].config.strict:
        raise ApiError(400, f"tools of type {', '.join(sorted(kinds))} are not run", param="tools")
    warning = f"tools ignored: {ascii(', '.join(sorted(kinds)))[1:-1]}"
    before = request.get(WARNINGS)
    request[WARNINGS] = warning if before is None else f"{before}; {warning}"
    request.app[SERVICE].warn_once(warning)


async def messages(request: web.Request) -> web.StreamResponse:
    """`POST /v1/messages`."""
    arrival = time.monotonic()
    service = request.app[SERVICE]
    service.require_serving()
    body = await read_request(request, MessagesRequest)
    body.model = service.served_name(body.model)
    large = is_large(request)
    chat = await service.offload.run_if(large, messages_api.as_chat, body)
    # Clients have to name a number, and name that of larger models.
    plan = await plan_chat(service, chat, large, clip=True)
    spelling = MessagesFormat(heading("msg", body.model), plan.new_reader(), plan.call_id)
    return await respond(request, service, plan.job(spelling, arrival))


async def count_tokens(request: web.Request) -> web.Response:
    """`POST /v1/messages/count_tokens`."""
    service = request.app[SERVICE]
    body = await read_request(request, CountTokensRequest)
    body.model = service.served_name(body.model)
    large = is_large(request)
    chat = await service.offload.run_if(large, messages_api.as_chat, body)
    prompt = await chat_prompt_of(service, chat, large)
    return json_response({"input_tokens": len(prompt.token_ids)})
