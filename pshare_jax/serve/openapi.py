"""`GET /openapi.json`: what the server takes and answers, as OpenAPI 3.1, made from the structs
that requests are read into."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

from pshare_jax import __version__
from pshare_jax.frontend.messages_api import CountTokensRequest, MessagesRequest
from pshare_jax.frontend.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    FanoutRequest,
    TokenizeRequest,
)
from pshare_jax.frontend.responses_api import ResponsesRequest
from pshare_jax.serve.admin import LoadAdapter, UnloadAdapter
from pshare_jax.serve.protocol import (
    ChatCompletion,
    Completion,
    DetokenizeResponse,
    FanoutAnswer,
    ModelCard,
    ModelList,
    TokenizeResponse,
)

_REFERENCE = "#/components/schemas/{name}"
_OBJECT = {"type": "object"}


class ErrorDetail(msgspec.Struct):
    """What was wrong; `param` names the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(msgspec.Struct):
    """Every answer other than success."""

    error: ErrorDetail


@dataclass(frozen=True)
class Endpoint:
    """A method of a path.

    Args:
        summary: what it does.
        answer: the struct of its answer, or a JSON schema; None for text.
        request: the struct of its body.
        streams: whether `stream: true` makes the answer server-sent events.
        statuses: further answers, beside 200 and errors in general.
    """

    summary: str
    answer: type[msgspec.Struct] | dict[str, Any] | None
    request: type[msgspec.Struct] | None = None
    streams: bool = False
    statuses: tuple[int, ...] = ()


ENDPOINTS: dict[tuple[str, str], Endpoint] = {
    ("post", "/v1/completions"): Endpoint(
        "Completes prompts, as OpenAI's API does.", Completion, CompletionRequest, streams=True
    ),
    ("post", "/v1/chat/completions"): Endpoint(
        "Answers a conversation, as OpenAI's API does.", ChatCompletion, ChatRequest, streams=True
    ),
    ("post", "/v1/fanout"): Endpoint(
        "Answers a conversation by several models at once.",
        FanoutAnswer,
        FanoutRequest,
        streams=True,
    ),
    ("post", "/v1/responses"): Endpoint(
        "Answers a conversation, as OpenAI's Responses API does, without storing it.",
        _OBJECT,
        ResponsesRequest,
        streams=True,
    ),
    ("post", "/v1/messages"): Endpoint(
        "Answers a conversation, as Anthropic's Messages API does.",
        _OBJECT,
        MessagesRequest,
        streams=True,
    ),
    ("post", "/v1/messages/count_tokens"): Endpoint(
        "Counts the tokens of a conversation, as Anthropic's API does.",
        {
            "type": "object",
            "properties": {"input_tokens": {"type": "integer"}},
            "required": ["input_tokens"],
        },
        CountTokensRequest,
    ),
    ("post", "/v1/load_lora_adapter"): Endpoint(
        "Serves one more decode module, LoRA or full, as vLLM's API does.", None, LoadAdapter
    ),
    ("post", "/v1/unload_lora_adapter"): Endpoint(
        "Serves a decode module no more.", None, UnloadAdapter
    ),
    ("post", "/tokenize"): Endpoint("Tokenises a text.", TokenizeResponse, TokenizeRequest),
    ("post", "/detokenize"): Endpoint("The text of tokens.", DetokenizeResponse, DetokenizeRequest),
    ("get", "/v1/models"): Endpoint("The served models.", ModelList),
    ("get", "/v1/models/{model}"): Endpoint("One served model.", ModelCard),
    ("get", "/health"): Endpoint("Whether anything can be served.", _OBJECT, statuses=(503,)),
    ("get", "/ready"): Endpoint("Whether requests are taken now.", _OBJECT, statuses=(503,)),
    ("get", "/metrics"): Endpoint("Metrics in Prometheus' text format.", None),
    ("get", "/version"): Endpoint("The server's version.", _OBJECT),
    ("get", "/openapi.json"): Endpoint("This description.", _OBJECT),
}


async def describe(_: web.Request) -> web.Response:
    """`GET /openapi.json`."""
    return web.Response(body=_encoded(), content_type="application/json")


@functools.cache
def _encoded() -> bytes:
    return msgspec.json.encode(document())


def document() -> dict[str, Any]:
    """The description, as plain data."""
    structs: list[type[msgspec.Struct]] = [ErrorAnswer]
    for endpoint in ENDPOINTS.values():
        for kind in (endpoint.request, endpoint.answer):
            if isinstance(kind, type) and kind not in structs:
                structs.append(kind)
    schemas, components = msgspec.json.schema_components(structs, ref_template=_REFERENCE)
    by_struct = dict(zip(structs, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), endpoint in ENDPOINTS.items():
        paths.setdefault(path, {})[method] = _operation(method, path, endpoint, by_struct)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "pshare_jax",
            "version": __version__,
            "description": "Decode modules over one shared prefill module.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        # Whether keys are asked for is configured.
        "security": [{}, {"bearer": []}, {"x-api-key": []}],
    }


def _operation(
    method: str, path: str, endpoint: Endpoint, schemas: dict[type[msgspec.Struct], Any]
) -> dict[str, Any]:
    answer = endpoint.answer
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if answer is not None:
        schema = schemas[answer] if isinstance(answer, type) else answer
        content = {"application/json": {"schema": schema}}
    responses = {
        str(status): {"description": "see the body", "content": content}
        for status in endpoint.statuses
    }
    if endpoint.streams:
        content = {**content, "text/event-stream": {"schema": {"type": "string"}}}
    error = {"application/json": {"schema": schemas[ErrorAnswer]}}
    if path.startswith("/v1/messages"):
        error = {"application/json": {"schema": _OBJECT}}  # Anthropic's shape
    operation: dict[str, Any] = {
        "operationId": f"{method}_{path.strip('/').replace('/', '_').replace('.', '_')}",
        "summary": endpoint.summary,
        "responses": {
            "200": {"description": "success", "content": content},
            **responses,
            "default": {"description": "an error", "content": error},
        },
    }
    if "{model}" in path:
        operation["operationId"] = f"{method}_v1_model"
        operation["parameters"] = [
            {
                "name": "model",
                "in": "path",
                "required": True,
                "description": "its name, which may hold slashes",
                "schema": {"type": "string", "minLength": 1},
            }
        ]
    if endpoint.request is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schemas[endpoint.request]}},
        }
    return operation
