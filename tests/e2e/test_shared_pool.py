"""Two servers of one host that share a pool of KV: both know what either has computed."""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from pshare_jax.serve.process import server_process
from tests.e2e import metrics
from tests.e2e.conftest import FEW, ROOT, write_config

pytestmark = pytest.mark.e2e

SERVER = (sys.executable, "-m", "tests.e2e.eager_server")


@dataclass
class Server:
    """A server and a client of it."""

    url: str
    process: subprocess.Popen[str]
    client: openai.OpenAI

    def ask(self, prompt: list[int], model: str = "coder") -> tuple[str, int]:
        """An answer, and how many tokens of its prompt were not computed for it."""
        answer = self.client.completions.create(
            model=model, prompt=prompt, max_tokens=8, temperature=0
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return answer.choices[0].text, answer.usage.prompt_tokens_details.cached_tokens or 0

    def tier(self, name: str) -> float:
        """A figure of the shared memory."""
        return metrics.read(self.url)[name][("shared",)]

    def slots(self) -> dict[str, float]:
        """Slots of the pool by state."""
        slots = metrics.read(self.url)["pshare_store_slots"]
        return {state: count for labels, count in slots.items() for state in {*labels} - {"shared"}}

    def settle(self, stored: int) -> None:
        """Waits until it has written so many pages, and reads and writes no more."""
        metrics.eventually(lambda: self.tier("pshare_store_stored_total") == stored)
        metrics.eventually(lambda: not (self.slots()["pinned"] or self.slots()["writing"]))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def servers(tiny_folder: Path, tmp_path: Path) -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start(stack: ExitStack, tiny_folder: Path, pool: Path) -> Server:
    config = write_config(
        tiny_folder,
        models=[
            {"name": "coder", "checkpoint": str(tiny_folder / "coder")},
            {"name": "critic", "checkpoint": str(tiny_folder / "critic")},
        ],
        kv_store={"path": str(pool), "bytes": 2**24},
        reply_kv="off",
        **FEW | {"prefill": {"chunk_buckets": [256]}},
    )
    url, process = stack.enter_context(
        server_process([f"--config={config}"], program=SERVER, checkout=str(ROOT))
    )
    api = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    return Server(url, process, stack.enter_context(api))


def context(seed: int, pages: int) -> list[int]:
    """So many full pages, and the token that the decode module reads itself."""
    return [(seed * 7919 + i * i) % 256 for i in range(16 * pages + 1)]


def test_two_servers_share_a_pool_and_each_survives_the_other(
    servers: ExitStack, tiny_folder: Path, tmp_path: Path
):
    first = start(servers, tiny_folder, tmp_path / "pool")
    second = start(servers, tiny_folder, tmp_path / "pool")

    answer, cached = first.ask(context(1, 40))
    assert cached == 0
    first.settle(stored=40)
    assert second.ask(context(1, 40)) == (answer, 640), "nothing was computed again"
    assert second.tier("pshare_store_hits_total") == 40
    by_critic, cached = second.ask(context(2, 10), "critic")
    assert cached == 0
    second.settle(stored=10)
    assert first.ask(context(2, 10), "critic") == (by_critic, 160)

    # In the middle of all that it may be doing with the pool.
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(first.ask, context(seed, 60)) for seed in range(10, 18)]
        metrics.eventually(lambda: second.slots()["ready"] > 50)
        first.kill()
        for one in asked:
            assert one.exception() is None or isinstance(one.exception(), openai.APIError)

    assert second.ask(context(1, 40)) == (answer, 640)
    known = {seed: second.ask(context(seed, 60)) for seed in range(10, 18)}
    # It has written what the first one has not, or has left half-written.
    metrics.eventually(lambda: second.slots()["ready"] == 40 + 10 + 8 * 60)
    missed = metrics.read(second.url)["pshare_store_missed_total"]
    assert {label for labels in missed for label in labels} <= {"shared", "missing"}

    third = start(servers, tiny_folder, tmp_path / "pool")
    second.kill()
    for seed, (text, _) in known.items():
        assert third.ask(context(seed, 60)) == (text, 960), "whoever has computed it"
    assert third.ask(context(2, 10), "critic") == (by_critic, 160)
    third.settle(stored=0)
