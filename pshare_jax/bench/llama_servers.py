"""llama.cpp's servers, one a model, for as long as a `with` block lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from pshare_jax.bench.peers import running_peer


@dataclass(frozen=True)
class LlamaServers:
    """Servers of llama.cpp to start, each with a model of its own.

    Args:
        binary: `llama-server`.
        model: GGUF file that every one serves.
        slots: sequences that each works on at a time; one that waits for a slot is queued.
        context: tokens that each slot has room for.
        threads: of each server.
        args: further flags of each.
    """

    binary: str
    model: str
    slots: int = 16
    context: int = 1024
    threads: int = 2
    args: list[str] = field(default_factory=list)


@contextmanager
def running_llama(servers: LlamaServers, count: int) -> Iterator[list[str]]:
    """Starts `count` servers on 127.0.0.1, one after the other; gives their URLs.

    Raises:
        BenchmarkError: one ended, or was not ready in time; with the end of its log.
    """
    command = [servers.binary, "--model", servers.model, "--parallel", str(servers.slots)]
    # It divides this among its slots.
    command += ["--ctx-size", str(servers.slots * servers.context)]
    command += ["--threads", str(servers.threads), "--no-ui", *servers.args]
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                running_peer("llama_cpp.binary", [*command, "--alias", f"model{i}"])
            )
            for i in range(count)
        ]
