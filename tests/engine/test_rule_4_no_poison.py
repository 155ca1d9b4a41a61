"""Rule 4: what a decode module writes is seen by its own sequence alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pshare_jax.core.pages.prefix_index import Node, root_key
from tests.engine.harness import Client, Models, in_thread_of

PAGE = 8


def prompt_of(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def pages_of(client: Client, side: str) -> np.ndarray:
    """All pages of a pool, `[layers, pages, ...]`."""
    pool = getattr(client.engine.workers, side)[0].executor.pool
    return in_thread_of(
        client,
        f"{side}0",
        lambda: pool.read(lambda pages: np.stack([np.asarray(p) for p in pages])),
    )


@pytest.mark.parametrize("name", ["full", "lora", "lora-tail5"])
def test_rule_4_no_poison(client: Client, models: Models, name: str) -> None:
    """A model's own output is prefilled by the base when it comes back as a prompt."""
    salt = f"own output of {name}"
    prompt = prompt_of(1, 21)
    tail = models.tails[name]
    first = client.generate(name, prompt, 12, cache_salt=salt)
    longer = [*prompt, *first.tokens]
    before = client.computed()
    again = client.generate(name, longer, cache_salt=salt)
    assert client.computed() - before == len(first.tokens)
    assert again.usage is not None
    assert again.usage.cached_tokens == len(prompt) - tail
    assert again.tokens == models.expected(name, longer)


BRANCHES = {
    "mid page": prompt_of(10, 13),
    "longer in that page": [*prompt_of(10, 13), 7, 7],
    "to its end": [*prompt_of(10, 13), 7, 7, 7, 9],
    "past its end": [*prompt_of(10, 13), 7, 7, 7, 9, 4, 4],
    "branching off in it": [*prompt_of(10, 10), 3, 3, 3, 3],
    "branching off later": [*prompt_of(10, 13), 8, 8, 1, 1, 1],
}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("picked", list(itertools.combinations(BRANCHES, 3))[::2])
def test_rule_4_partly_filled_page(
    client: Client, models: Models, picked: tuple[str, ...], order: tuple[int, ...]
) -> None:
    """Prompts that end in, go on from, and branch off within one page while others decode."""
    salt = f"{picked} {order}"
    prompts = [BRANCHES[picked[i]] for i in order]
    names = ("full", "lora", "identity")
    # A full model decodes long enough to be still at it when the last one has answered.
    replies = [client.submit("full", prompts[0], 40, cache_salt=salt)]
    replies[0].next_event()
    for name, prompt in zip(names, prompts, strict=True):
        # One that comes while another computes the same half page would compute it too.
        replies.append(client.submit(name, prompt, cache_salt=salt))
        replies[-1].next_event()
    for reply in replies:
        reply.wait()
    assert replies[0].tokens == models.expected("full", prompts[0], 40)
    for reply, name, prompt in zip(replies[1:], names, prompts, strict=True):
        assert reply.tokens == models.expected(name, prompt), (name, prompt)
    # Each different beginning is computed once.
    beginnings = {tuple(prompt[:n]) for prompt in prompts for n in range(1, len(prompt))}
    computed = [reply.usage.computed_tokens for reply in replies if reply.usage is not None]
    assert sum(computed) == len(beginnings)


def test_decoding_leaves_prefill_pages_alone(client: Client) -> None:
    """The prefill pool, and the shared pages of the decode pool, keep every bit."""
    salt, prompt = "pages", prompt_of(20, 21)
    client.generate("full", prompt, 1, cache_salt=salt)
    before = {side: pages_of(client, side) for side in ("prefill", "decode")}
    replies = [client.submit(n, prompt, 30, cache_salt=salt) for n in ("full", "lora", "identity")]
    for reply in replies:
        reply.wait()
    after = {side: pages_of(client, side) for side in ("prefill", "decode")}
    # Page 0 takes the writes of padding.
    np.testing.assert_array_equal(before["prefill"][:, 1:], after["prefill"][:, 1:])
    cache = client.engine.workers.decode[0].cache
    cached = [page for page in range(1, 28) if cache.node_of(page) is not None]
    assert len(cached) >= 2
    np.testing.assert_array_equal(before["decode"][:, cached], after["decode"][:, cached])
    assert np.abs(before["decode"][:, cached]).sum() > 0


def test_only_prompt_pages_are_indexed(client: Client, models: Models) -> None:
    """Neither index holds a token that was generated, nor one that the decode module read."""
    prompt, salt = prompt_of(30, 21), "indexed"
    client.generate("full", prompt, 30, cache_salt=salt)
    runtime = client.engine._served.specs["full"]
    root = root_key(runtime.namespace, salt)
    held: dict[str, list[tuple[int, ...]]] = {}
    for name, cache in client.engine.caches.items():
        nodes = [cache.node_of(page) for page in range(1, cache.num_usable + 1)]
        chains = [chain_of(node) for node in nodes if node is not None]
        held[name] = sorted(
            tuple(n for node in c for n in node.tokens) for c in chains if c[0].parent_key == root
        )
    assert held["prefill0"] == [tuple(prompt[:n]) for n in (8, 16, 20)]
    assert held["decode0"] == [tuple(prompt[:n]) for n in (8, 16)]


def chain_of(node: Node) -> list[Node]:
    return [*(chain_of(node.parent) if node.parent is not None else []), node]
