"""What the benchmark drives: servers that run already, or servers of ours that it starts."""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import yaml

from pshare_jax.bench.agents_client import Endpoint
from pshare_jax.errors import BenchmarkError, ConfigError
from pshare_jax.serve.process import running_server

ISOLATED = "isolated"
SHARED = "shared"
SERVERS = "servers"
VLLM = "vllm"
VLLM_LORA = "vllm, LoRA"
LLAMA_CPP = "llama.cpp"


@dataclass(frozen=True)
class Target:
    """Models that sessions are played against, in the order in which they are called."""

    name: str
    endpoints: list[Endpoint]

    @property
    def urls(self) -> list[str]:
        """The servers' addresses, one a model."""
        return [endpoint.url for endpoint in self.endpoints]


@contextmanager
def started(
    configs: dict[str, str], args: Sequence[str], checkouts: Mapping[str, str]
) -> Iterator[dict[str, str]]:
    """Starts a server for each `{name: configuration file}`; gives `{name: url}`.

    Args:
        configs: configuration files by name.
        args: further flags of all servers.
        checkouts: by name, the folder of the code that a server runs where it is not this one.

    Raises:
        EngineDeadError: a server did not start.
    """
    with exiting_on_sigterm(), ExitStack() as stack:
        yield {
            name: stack.enter_context(
                running_server([f"--config={config}", *args], checkout=checkouts.get(name))
            )
            for name, config in configs.items()
        }


@contextmanager
def exiting_on_sigterm() -> Iterator[None]:
    """Has SIGTERM raise `SystemExit` in the block: by default servers would not be waited for."""
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(number: int, _: object) -> None:
    sys.exit(128 + number)


def tokenizer_folder(given: str | None, configs: dict[str, str]) -> str:
    """The folder named by the user, or else that of the configurations' base.

    Raises:
        ConfigError: neither is there, or a configuration is missing.
    """
    for name, config in configs.items():
        if not Path(config).is_file():
            raise ConfigError(f"{name}: there is no configuration file {config}")
    if given is not None:
        return given
    for config in configs.values():
        base = (yaml.safe_load(Path(config).read_text()) or {}).get("base")
        if base is not None:
            return f"{base}/tokenizer"
    raise ConfigError("tokenizer: name the folder of the models' tokenizer")


async def find_target(
    http: aiohttp.ClientSession, name: str, urls: Sequence[str], names: Sequence[str], count: int
) -> Target:
    """A target of `count` models.

    Args:
        http: for asking the servers what they serve.
        name: of the target.
        urls: one for all models, or one a model.
        names: of the models; empty takes what the servers list, in their order.
        count: of the models.

    Raises:
        ConfigError: too few models, or the numbers of URLs and models do not fit.
        BenchmarkError: a server cannot be asked.
    """
    addresses = [url.rstrip("/").removesuffix("/v1") for url in urls]
    if len(addresses) > 1:
        if len(addresses) < count:
            raise ConfigError(
                f"urls: {len(addresses)} for {count} models; give one URL, or as many"
            )
        found = list(names) or [(await _served(http, url))[0] for url in addresses]
        addresses = addresses[: len(found)]
    else:
        found = list(names) or await _served(http, addresses[0])
        addresses *= len(found)
    if len(found) < count:
        raise ConfigError(f"{name}: {count} models are needed, these are there: {', '.join(found)}")
    pairs = list(zip(addresses, found, strict=False))[:count]
    return Target(name, [Endpoint(url, model) for url, model in pairs])


async def _served(http: aiohttp.ClientSession, url: str) -> list[str]:
    try:
        async with http.get(f"{url}/v1/models") as response:
            response.raise_for_status()
            cards = (await response.json())["data"]
    except (aiohttp.ClientError, TimeoutError, KeyError, ValueError) as error:
        raise BenchmarkError(f"{url}/v1/models: {type(error).__name__}: {error}") from error
    if not cards:
        raise BenchmarkError(f"{url}/v1/models lists no model")
    return [card["id"] for card in cards]


@asynccontextmanager
async def open_http(timeout: float, api_key: str | None) -> AsyncIterator[aiohttp.ClientSession]:
    """A session without a bound on connections; `timeout` in seconds bounds each call."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=timeout),
        headers=headers,
    ) as http:
        yield http
