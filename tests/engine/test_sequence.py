from __future__ import annotations

from typing import Any

import pytest
from pshare_jax.engine.sequence import ModelRuntime, Sequence

from pshare_jax.core.messages import (
    FinishReason,
    PromptUsage,
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from pshare_jax.core.pages.prefix_index import block_keys

PAGE = 4


def make(
    prompt: list[int], *, tail: int = 1, namespace: str = "base", salt: str = "", **params: Any
) -> tuple[Sequence, list[RequestOutput], list[FinishReason]]:
    """A sequence, the events it emits, and the reasons its end was reported with."""
    events: list[RequestOutput] = []
    ends: list[FinishReason] = []
    ends_with = params.pop("ends", ())
    sequence = Sequence(
        Request("r", "m", tuple(prompt), SamplingParams(**params), salt),
        ModelRuntime("m", "full", "shared", tail, "base", namespace, "full/m"),
        events.append,
        order=0,
        seed=0,
        page_size=PAGE,
        end_token_ids=frozenset(ends_with),
        on_finish=lambda sequence, reason: ends.append(reason),
    )
    return sequence, events, ends


def feed(
    sequence: Sequence, tokens: list[int], logprobs: list[TokenLogprobs] | None = None
) -> None:
    accepted, reason = sequence.accept(tokens)
    sequence.emit(accepted, logprobs or [], reason)


@pytest.mark.parametrize(
    ("length", "tail", "cover", "num_keys"),
    [(1, 1, 0, 0), (4, 1, 3, 0), (5, 1, 4, 1), (9, 1, 8, 2), (9, 5, 4, 1), (3, 5, 0, 0)],
)
def test_cover(length: int, tail: int, cover: int, num_keys: int) -> None:
    sequence, _, _ = make(list(range(length)), tail=tail)
    assert (sequence.cover, len(sequence.keys)) == (cover, num_keys)
    assert sequence.keys == block_keys(sequence.root, list(range(cover)), PAGE)


def test_the_chain_tells_prompts_apart_to_the_last_token() -> None:
    prompts = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7, 8], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 9]]
    chains = [make(prompt)[0].chain for prompt in prompts]
    # Covered are 12345, 123457, 1234 and 123456.
    assert len({chain[-1] for chain in chains}) == 4
    assert {len(chain) for chain in chains} == {2}
    assert len({chain[0] for chain in chains}) == 1
    assert make([1, 2, 3, 4, 5, 0])[0].chain == chains[0], "the tail does not count"
    others = [make(prompts[0], salt="x")[0], make(prompts[0], namespace="own")[0]]
    assert len({chains[0][0], *(other.chain[0] for other in others)}) == 3


def test_cover_blocks_and_known_tokens() -> None:
    sequence, _, _ = make(list(range(10, 17)))
    assert [sequence.cover_block(i) for i in range(2)] == [[10, 11, 12, 13], [14, 15]]
    assert [sequence.parent_key(i) for i in range(2)] == [sequence.root, sequence.keys[0]]
    feed(sequence, [1, 2, 3])
    assert sequence.num_tokens == 10
    assert sequence.known_tokens(5, 9) == [15, 16, 1, 2]
    assert sequence.known_tokens(8, 10) == [2, 3]
    assert sequence.known_tokens(0, 7) == list(range(10, 17))


def test_events() -> None:
    sequence, events, ends = make([1, 2], max_tokens=3)
    sequence.usage = PromptUsage(2, 1, 0, 0)
    feed(sequence, [7])
    feed(sequence, [8, 9])
    assert [e.token_ids for e in events] == [(7,), (8, 9)]
    assert [e.usage for e in events] == [sequence.usage, None]
    assert [e.finish_reason for e in events] == [None, FinishReason.LENGTH]
    assert events[-1].stop_token is None
    assert ends == [FinishReason.LENGTH]
    assert sequence.abandoned


@pytest.mark.parametrize(
    ("fed", "kept", "reason"),
    [
        ([5, 6, 50, 7], [5, 6, 50], FinishReason.STOP),
        ([50, 50], [50], FinishReason.STOP),
        ([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5], FinishReason.LENGTH),
        ([1, 2, 3, 4, 50, 6], [1, 2, 3, 4, 50], FinishReason.STOP),
        ([1, 2], [1, 2], None),
    ],
)
def test_tokens_after_the_end_are_cut_off(
    fed: list[int], kept: list[int], reason: FinishReason | None
) -> None:
    sequence, events, _ = make([1], max_tokens=5, ends=[50, 51])
    feed(sequence, fed, [TokenLogprobs(float(-t)) for t in fed])
    assert events[0].token_ids == tuple(kept)
    assert [entry.logprob for entry in events[0].logprobs] == [-float(t) for t in kept]
    assert events[0].finish_reason is reason
    assert events[0].stop_token == (50 if reason is FinishReason.STOP else None)
    assert sequence.output == kept
    assert sequence.remaining == 5 - len(kept)


def test_the_end_comes_once_and_nothing_follows_it() -> None:
    sequence, events, ends = make([1])
    sequence.finish(FinishReason.ERROR, "broken")
    sequence.finish(FinishReason.ABORT)
    feed(sequence, [1])
    assert [(e.finish_reason, e.error) for e in events] == [(FinishReason.ERROR, "broken")]
    assert ends == [FinishReason.ERROR]


def test_the_end_is_reported_before_it_is_emitted() -> None:
    order: list[str] = []
    sequence, _, _ = make([1])
    sequence._on_finish = lambda sequence, reason: order.append("books")
    sequence._sink = lambda event: order.append("event")
    sequence.finish(FinishReason.ABORT)
    assert order == ["books", "event"]
