"""Rule 2: whatever the engine does to a request, its greedy tokens are the oracle's."""

from __future__ import annotations

import numpy as np
import pytest

from pshare_jax.config import DecodeConfig, PrefillConfig, ServeConfig
from tests.engine.harness import Models, every_kind, running, serve_config, two_by_two
from tests.pairwise import some

# Numbers of positions that the prefill module covers, around every border of a page or a chunk.
COVERS = (0, 1, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 47)
MAX_TOKENS = 11


def unequal(prefill_tp: int, decode_tp: int, steps: int) -> ServeConfig:
    """Meshes of unequal tensor parallelism."""
    return serve_config(
        prefill=PrefillConfig(tensor_parallel=prefill_tp, chunk_buckets=[16]),
        decode=DecodeConfig(
            tensor_parallel=decode_tp,
            batch_buckets=[4],
            max_num_seqs=12,
            replay_buckets=[3],
            steps_per_dispatch=steps,
        ),
    )


CASES = {
    "llama, 2 + 2 engines": ("llama", two_by_two()),
    "mistral, tensor parallel 2 to 4": ("mistral", unequal(2, 4, 1)),
    "qwen2, 1 + 1 engines": ("qwen2", serve_config()),
    "qwen2, tensor parallel 1 to 2": ("qwen2", unequal(1, 2, 4)),
    "qwen3, tensor parallel 1 to 2": ("qwen3", unequal(1, 2, 4)),
}
CHOSEN = [name for name in CASES if name.startswith(("llama", "mistral", "qwen2, tensor"))]


def requests(models: Models) -> list[tuple[str, tuple[int, ...]]]:
    """Prompts of every length for every model, most of them beginnings of two contexts."""
    rng = np.random.default_rng(0)
    contexts = rng.integers(0, 256, (2, 64)).tolist()
    found = []
    for name, tail in models.tails.items():
        lengths = {1, *(cover + tail for cover in COVERS)}
        found += [(name, tuple(contexts[i % 2][:n])) for i, n in enumerate(sorted(lengths))]
        found.append((name, (*contexts[0][:21], *contexts[1][:9])))
    return [found[i] for i in rng.permutation(len(found))]


@pytest.mark.parametrize("case", some(CASES, CHOSEN))
def test_rule_2_oracle(case: str) -> None:
    architecture, config = CASES[case]
    models = every_kind(architecture)
    with running(models, config) as client:
        asked = requests(models)
        replies = [client.submit(name, prompt, MAX_TOKENS) for name, prompt in asked]
        for reply in replies:
            reply.wait(120)
        client.check_idle()
    for (name, prompt), reply in zip(asked, replies, strict=True):
        expected = models.expected(name, prompt, MAX_TOKENS)
        assert reply.tokens == expected, (name, len(prompt))
        assert reply.reason == "length"


def test_the_oracle_tells_models_and_tails_apart() -> None:
    """Otherwise rule 2 would hold for an engine that mixes them up."""
    models = every_kind("llama")
    prompts = [[5], list(range(40))]
    by_model = {
        name: tuple(tuple(models.expected(name, prompt, MAX_TOKENS)) for prompt in prompts)
        for name in models.full_weights
    }
    assert len(set(by_model.values())) == len(by_model)
    own = models.full_weights["full"]
    tails = {
        tail: tuple(models.oracle.generate(models.base, own, prompts[1], MAX_TOKENS, tail=tail))
        for tail in (1, 2, 5)
    }
    assert len(set(tails.values())) == 3
