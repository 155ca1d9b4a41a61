"""The small endpoints: models, tokens, and the server's own state."""

from __future__ import annotations

import msgspec
from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_1_0_0

from pshare_jax import __version__
from pshare_jax.errors import RequestError
from pshare_jax.frontend.chat import TemplateOptions, chat_prompt, encode
from pshare_jax.frontend.params import Limits, check_token_ids
from pshare_jax.frontend.requests import DetokenizeRequest, TokenizeRequest
from pshare_jax.serve.engine_api import ModelInfo
from pshare_jax.serve.offload import is_large
from pshare_jax.serve.parsing import read_request
from pshare_jax.serve.protocol import DetokenizeResponse, ModelCard, ModelList, TokenizeResponse
from pshare_jax.serve.service import SERVICE, Service


def json_response(value: object, status: int = 200) -> web.Response:
    """`value`, a struct or plain data, as JSON."""
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json"
    )


async def list_models(request: web.Request) -> web.Response:
    """`GET /v1/models`."""
    service = request.app[SERVICE]
    models = service.engine.models
    cards = [_card(service, model) for model in models.values()]
    cards += [
        _card(service, models[name], alias)
        for alias, name in service.aliases.items()
        if name in models
    ]
    return json_response(ModelList(cards))


async def get_model(request: web.Request) -> web.Response:
    """`GET /v1/models/{id}`; the id may hold slashes."""
    service = request.app[SERVICE]
    name = request.match_info["model"]
    return json_response(_card(service, service.model(name), name))


async def tokenize(request: web.Request) -> web.Response:
    """`POST /tokenize`."""
    service = request.app[SERVICE]
    body = await read_request(request, TokenizeRequest)
    if body.model is not None:
        service.model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give either prompt or messages", param="prompt")
    if body.prompt is not None:
        answer = await service.offload.run_if(is_large(request), _tokenize, service, body)
    else:
        answer = await service.offload.run(is_large(request), _tokenize, service, body)
    return web.Response(body=answer, content_type="application/json")


def _tokenize(service: Service, body: TokenizeRequest) -> bytes:
    # Counting is what this is for: a text of any length that fits a body may be counted.
    limits = Limits(service.limits.vocab_size, max_model_len=2**63)
    named = body.model
    tokenizer = service.tokenizer if named is None else service.tokenizer_of(named)
    if body.prompt is not None:
        special = body.add_special_tokens is not False
        ids = encode(tokenizer, body.prompt, limits, "prompt", special)
    else:
        prompt = chat_prompt(
            tokenizer,
            limits,
            body.messages or [],
            body.tools,
            TemplateOptions(
                body.add_generation_prompt is not False,
                body.chat_template_kwargs,
                bool(body.add_special_tokens),
                tool_prompt=service.format_of(body.model).tool_prompt,
                special_tokens=service.config.special_tokens_in_text,
            ),
        )
        ids = list(prompt.token_ids)
    strings = None
    if body.return_token_strs:
        strings = [tokenizer.token_string(i) or "" for i in ids]
    return msgspec.json.encode(
        TokenizeResponse(len(ids), service.limits.max_model_len, ids, strings)
    )


async def detokenize(request: web.Request) -> web.Response:
    """`POST /detokenize`."""
    service = request.app[SERVICE]
    body = await read_request(request, DetokenizeRequest)
    if body.model is not None:
        service.model(body.model)
    limit = service.limits.max_model_len
    if len(body.tokens) > limit:
        raise RequestError(
            f"tokens holds {len(body.tokens)} ids; no sequence here has more than {limit}",
            param="tokens",
        )
    check_token_ids(body.tokens, service.limits.vocab_size, "tokens")
    text = await service.offload.run_if(
        is_large(request), service.tokenizer.decode, body.tokens, False
    )
    return json_response(DetokenizeResponse(text))


async def health(request: web.Request) -> web.Response:
    """`GET /health`: 503 once nothing can be served; names the workers that have failed."""
    service = request.app[SERVICE]
    if (dead := service.engine.dead) is not None:
        return json_response({"status": "dead", "reason": dead}, 503)
    if failed := dict(service.engine.failed_workers):
        return json_response({"status": "degraded", "failed_workers": failed})
    return json_response({"status": service.state})


async def ready(request: web.Request) -> web.Response:
    """`GET /ready`: 200 while requests are taken that would be served now.

    Those that come while workers are lacking wait for them, but had better go to who has some.
    """
    service = request.app[SERVICE]
    state, lacking = service.state, service.engine.lacking
    if state == "ok" and lacking:
        return json_response({"status": "waiting", "reason": f"no worker can {lacking}"}, 503)
    return json_response({"status": state}, 200 if state == "ok" else 503)


async def metrics(request: web.Request) -> web.Response:
    """`GET /metrics`."""
    service = request.app[SERVICE]
    body = await service.offload.run(False, service.metrics.render)
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_PLAIN_1_0_0})


async def version(_: web.Request) -> web.Response:
    """`GET /version`."""
    return json_response({"version": __version__})


def _card(service: Service, model: ModelInfo, alias: str | None = None) -> ModelCard:
    return ModelCard(
        id=alias or model.name,
        created=model.created,
        root=model.name,
        parent=model.parent,
        sharing=model.sharing,
        kind=model.kind,
        tail=model.tail,
        max_model_len=service.limits.max_model_len,
        chat_template=service.templates.name(model.name),
        weights=service.engine.model_config.weight_format,
    )
