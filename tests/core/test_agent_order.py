"""Who is called next in a session: what the client says, else what has been so far."""

from __future__ import annotations

from pshare_jax.core.agent_order import AgentOrder
from pshare_jax.core.pages.prefix_index import block_key, block_keys, root_key
from pshare_jax.core.requests import SamplingParams
from pshare_jax.core.sequences import Sequence

KEY = ("", "session")
PAGE = 4


def prompt(first: int, length: int = 8) -> Sequence:
    tokens = (first,) * length
    root = root_key("base", "")
    keys = block_keys(root, tokens[:-1], PAGE)
    return Sequence(
        id=0,
        order=0,
        model="m",
        prompt=tokens,
        covered=length - 1,
        root=root,
        keys=keys,
        last_key=block_key(keys[-1], tokens[len(keys) * PAGE : -1]),
        params=SamplingParams(),
    )


def call(order: AgentOrder, agent: str, sequence: Sequence, *hints: str) -> list[Sequence]:
    order.asked(KEY, agent, sequence)
    return order.expected(KEY, agent, hints, sequence)


def test_the_order_is_learned_from_the_session() -> None:
    order = AgentOrder()
    plan, write, test = prompt(1), prompt(2), prompt(3)
    assert call(order, "plan", plan) == []
    assert call(order, "write", write) == []
    assert call(order, "test", test) == []
    longer = prompt(1, 12)
    assert call(order, "plan", longer) == [write]
    assert call(order, "write", write) == [test]
    assert call(order, "test", test) == [longer], "its latest prompt"
    assert order.expected(("", "another"), "plan", (), plan) == []


def test_who_follows_most_often_is_expected_and_the_latest_among_equals() -> None:
    order = AgentOrder()
    agents = {name: prompt(i) for i, name in enumerate("abc")}
    for name in "abac":
        call(order, name, agents[name])
    assert call(order, "a", agents["a"]) == [agents["c"]]
    call(order, "b", agents["b"])
    assert call(order, "a", agents["a"]) == [agents["b"]]


def test_hints_come_first_and_agents_that_never_asked_are_left_out() -> None:
    order = AgentOrder()
    agents = {name: prompt(i) for i, name in enumerate("abc")}
    for name in "abc":
        call(order, name, agents[name])
    found = call(order, "a", agents["a"], "c", "nobody", "b", "c")
    assert found == [agents["c"], agents["b"]]


def test_what_the_present_prompt_begins_with_is_at_hand() -> None:
    """Agents that share one context: nothing has to be fetched."""
    order = AgentOrder()
    call(order, "a", prompt(1, 8))
    call(order, "b", prompt(1, 12))
    assert call(order, "a", prompt(1, 16), "b") == []


def test_little_is_remembered() -> None:
    order = AgentOrder(max_tokens=20)
    order.asked(("", "s"), "a", prompt(1, 12))
    order.asked(("", "s"), "a", prompt(1, 14))
    order.asked(("", "t"), "a", prompt(1, 6))
    assert len(order) == 2
    order.asked(("", "u"), "a", prompt(1, 7))
    assert len(order) == 2
    assert order.expected(("", "s"), "a", ("a",), prompt(2)) == []
