"""Every message is what it was when it has been sent; what is no message is refused."""

from __future__ import annotations

import typing

import msgspec
import pytest

from pshare_jax.core import messages as m
from pshare_jax.core.messages import PageDescriptor
from pshare_jax.core.models import ModelSpec
from pshare_jax.core.requests import FinishReason, PromptUsage, SamplingParams, TokenLogprobs
from pshare_jax.core.sequences import Moved, Sequence
from pshare_jax.core.split_rule import LastTokens

SEQUENCE = Sequence(
    id=3,
    order=1,
    model="lora",
    prompt=(1, 2, 3),
    output=(4,),
    covered=2,
    adapted=False,
    root=b"\x00root",
    keys=[b"\xff" * 16],
    last_key=b"last",
    params=SamplingParams(max_tokens=3, logit_bias={7: -1.5}, stop_token_ids=(9,), seed=2**31),
    seed=2**32 - 1,
    end_token_ids=frozenset({9, 10}),
    num_uncached=1,
    prefill_worker="prefill0",
    decode_worker="decode1",
)
USAGE = PromptUsage(3, 1, 1, 1, 4096)
MESSAGES: list[m.Message] = [
    m.Prefill(SEQUENCE),
    m.Abort(3, "decode0"),
    m.Covered(SEQUENCE, USAGE),
    m.Withdrawn(3),
    m.Fetch("decode0", 2**62 + 1, 3, [0, 1]),
    m.Offered(5, [PageDescriptor(b"key", (0, 2), (2, 1, 4, 8), "bfloat16", "raw", 2**32 - 1)]),
    m.NotOffered(5, "gone"),
    m.Release(3),
    m.Lend("prefill1", 2**62 + 2, 3, [b"k" * 16], (1, 2, 3, 4), "reader"),
    m.Repaid(3, 2**62 + 2),
    m.Looked(3, [1, 1, 2]),
    m.Loaded(2**62, "its checksum is wrong"),
    m.Stored([b"a", b"b"], [b"a"], [b"c"]),
    m.Replied(msgspec.structs.replace(SEQUENCE, ttl=0.5), 1, True),
    m.Expected(msgspec.structs.replace(SEQUENCE, moved=Moved("prefill1", 7, 5, [b"a", b"b"]))),
    m.SetRole(True),
    m.Pending(3, 7),
    m.IndexChanged([b"a"], [b"b", b"c"], 7, 2**63),
    m.IndexSnapshot([b"a", b"b"], 7, 2**63),
    m.IndexWanted(),
    m.StoreChanged([b"a"], [b"b", b"c"]),
    m.Started(3, USAGE),
    m.Tokens(3, (1, 2), (TokenLogprobs(-0.5, ((1, -0.5), (2, -1.0))),), FinishReason.STOP),
    m.Tokens(3, (1,)),
    m.Returned(3, "fetch", "corrupt"),
    m.Dropped(3),
    m.Failed(3, "out of memory"),
    m.ModelAdded(
        ModelSpec("a@2", "lora", "shared", LastTokens(2), "base", "print", "base", 1, ("decode0",))
    ),
    m.ModelRemoved("a"),
    m.WeightsFreed("full/a"),
]


def test_every_kind_of_message_is_here() -> None:
    assert {type(message) for message in MESSAGES} == set(typing.get_args(m.Message))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_comes_as_it_was_sent(message: m.Message) -> None:
    received = m.decode(m.encode(message))
    assert received == message
    assert type(received) is type(message)


def test_a_sequence_that_came_is_worth_the_same_to_a_worker() -> None:
    message = m.decode(m.encode(m.Prefill(SEQUENCE)))
    assert isinstance(message, m.Prefill)
    assert message.sequence.chain == SEQUENCE.chain
    assert message.sequence.parent_key(0) == SEQUENCE.root
    assert isinstance(message.sequence.prompt, tuple)
    assert isinstance(message.sequence.end_token_ids, frozenset)


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"\xc1",
        m.encode(m.Release(3))[:-1],
        msgspec.msgpack.encode({"id": 3}),
        msgspec.msgpack.encode({"type": "Explode", "id": 3}),
        msgspec.msgpack.encode({"type": "Release"}),
        msgspec.msgpack.encode({"type": "Release", "id": "three"}),
        msgspec.msgpack.encode({"type": "Returned", "id": 3, "cause": "boredom"}),
        msgspec.msgpack.encode([1, 2, 3]),
    ],
)
def test_junk_is_refused(junk: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        m.decode(junk)
