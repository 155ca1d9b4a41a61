"""Decode modules come and go while the server runs: vLLM's endpoints for adapters."""

from __future__ import annotations

import asyncio
import logging

from aiohttp import web
from msgspec import Struct

from pshare_jax.config import Reasoning
from pshare_jax.errors import CheckpointError, ConfigError
from pshare_jax.frontend.model_format import check_tool_parser
from pshare_jax.serve.access import KEY
from pshare_jax.serve.adapter_paths import adapter_folder
from pshare_jax.serve.errors import ApiError
from pshare_jax.serve.parsing import read_request
from pshare_jax.serve.service import SERVICE, Service

log = logging.getLogger(__name__)


class LoadAdapter(Struct):
    """`POST /v1/load_lora_adapter`. With `load_inplace` it may take the place of a module.

    `tool_parser` and `reasoning` are as beside a model's name in the configuration; without them
    they are as of what has that name now, or as configured for it, or `auto`.
    """

    lora_name: str
    lora_path: str
    load_inplace: bool | None = None
    tool_parser: str | None = None
    reasoning: Reasoning | None = None


class UnloadAdapter(Struct):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: str
    lora_int_id: int | None = None


async def load_adapter(request: web.Request) -> web.Response:
    """`POST /v1/load_lora_adapter`: full modules too. Answers when it is served."""
    service = _admitted(request)
    body = await read_request(request, LoadAdapter)
    if body.lora_name in service.aliases:
        raise ApiError(
            400,
            f"{body.lora_name!r} is an alias of model {service.canonical(body.lora_name)!r}",
            param="lora_name",
        )
    try:
        check_tool_parser(body.tool_parser)
    except ConfigError as error:
        raise ApiError(400, str(error), param="tool_parser") from error
    # A thread of its own: it takes seconds, and requests go on meanwhile.
    await asyncio.to_thread(_load, service, body)
    service.metrics.add_model(body.lora_name)
    log.info("model %s is served from %s", ascii(body.lora_name), ascii(body.lora_path))
    return web.Response(text=f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def unload_adapter(request: web.Request) -> web.Response:
    """`POST /v1/unload_lora_adapter`. Requests that run go on to their end."""
    service = _admitted(request)
    body = await read_request(request, UnloadAdapter)
    await asyncio.to_thread(service.engine.unload_module, body.lora_name)
    log.info("model %s is not served any more", ascii(body.lora_name))
    return web.Response(text=f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _load(service: Service, body: LoadAdapter) -> None:
    folder = adapter_folder(service.config.adapter_root, body.lora_path)
    try:
        service.engine.load_module(
            body.lora_name,
            folder,
            replace=bool(body.load_inplace),
            tool_parser=body.tool_parser,
            reasoning=body.reasoning,
        )
    except (CheckpointError, ConfigError) as error:
        raise ApiError(400, str(error), param="lora_path", code="invalid_module") from error


def _admitted(request: web.Request) -> Service:
    """The service, if who asks may change what it serves.

    Raises:
        ApiError: 403, says what forbids it.
    """
    service = request.app[SERVICE]
    config = service.config
    if not config.adapter_root:
        raise _forbidden("loading is off: server.adapter_root names no folder")
    if not (request[KEY].admin or config.allow_runtime_loading):
        raise _forbidden(
            "loading needs an admin key (server.api_keys_file), or server.allow_runtime_loading: "
            "true, which lets everybody who may ask"
        )
    service.require_serving()
    return service


def _forbidden(message: str) -> ApiError:
    return ApiError(403, message, code="loading_forbidden")
