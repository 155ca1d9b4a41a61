"""vLLM's OpenAI-compatible servers, for as long as a `with` block lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field

from pshare_jax.bench.peers import running_peer

_MODULE = "vllm.entrypoints.openai.api_server"
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_WAIT_POLICY": "passive"}
"""What serves several of them on one machine best. By default each binds its threads to all CPUs
but the last, so that on a machine of two all share one; and idle threads spin, on CPUs that the
other servers need."""


@dataclass(frozen=True)
class VllmServers:
    """Servers of vLLM to start, each with a model of its own.

    Args:
        python: an interpreter that has vLLM for CPUs installed.
        model: Hugging Face folder that every one serves; `convert export` makes one.
        each: start one server for each model that is called.
        adapters: by name, PEFT folders: with any, one more server is started, of the model and
            all of these, and measured as a target of its own. Called in this order, after the
            model itself.
        preload: libraries that vLLM advises to load first (`LD_PRELOAD`): tcmalloc, libiomp5.
        kv_gib: memory for KV of each.
        args: further flags of each.
        environment: further variables of each, or other values of `ENVIRONMENT`.
    """

    python: str
    model: str
    each: bool = True
    adapters: dict[str, str] = field(default_factory=dict)
    preload: list[str] = field(default_factory=list)
    kv_gib: int = 1
    args: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


@contextmanager
def running_vllm(servers: VllmServers, count: int) -> Iterator[list[str]]:
    """Starts `count` servers on 127.0.0.1, one after the other; gives their URLs.

    Raises:
        BenchmarkError: one ended, or was not ready in time; with the end of its log.
    """
    with ExitStack() as stack:
        yield [stack.enter_context(_server(servers, f"model{i}", [])) for i in range(count)]


def running_vllm_lora(servers: VllmServers) -> AbstractContextManager[str]:
    """Starts one server of the model, as `model0`, and `servers.adapters`; gives its URL.

    Raises:
        BenchmarkError: it ended, or was not ready in time; with the end of its log.
    """
    # All of them in a batch at the same time: a call never waits for another adapter's to end.
    flags = ["--enable-lora", "--max-loras", str(len(servers.adapters)), "--lora-modules"]
    flags += [f"{name}={folder}" for name, folder in servers.adapters.items()]
    return _server(servers, "model0", flags)


def _server(servers: VllmServers, name: str, flags: list[str]) -> AbstractContextManager[str]:
    command = [servers.python, "-m", _MODULE, "--model", servers.model]
    command += ["--served-model-name", name, "--dtype", "bfloat16"]
    command += ["--enable-prompt-tokens-details", *flags, *servers.args]
    environment = ENVIRONMENT | servers.environment
    environment["VLLM_TARGET_DEVICE"] = "cpu"
    environment["VLLM_CPU_KVCACHE_SPACE"] = str(servers.kv_gib)
    if servers.preload:
        environment["LD_PRELOAD"] = ":".join(servers.preload)
    return running_peer("vllm.python", command, environment)
