from __future__ import annotations

from dataclasses import dataclass, field

from pshare_jax.engine.sequence import ModelRuntime, Sequence

from pshare_jax.core.messages import Request
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.router import Router
from tests.cache.test_page_cache import fill

PAGE, NUM_PAGES = 2, 200


@dataclass
class Target:
    cache: PageCache = field(default_factory=lambda: PageCache(NUM_PAGES, PAGE))
    num_pending_tokens: int = 0


class Fleet:
    """A router over engines that do nothing but keep what they are sent in mind."""

    def __init__(self, prefill: int = 2, decode: int = 2):
        self.prefill = [Target() for _ in range(prefill)]
        self.decode = [PageCache(NUM_PAGES, PAGE) for _ in range(decode)]
        self.router = Router(self.prefill, self.decode)

    def send(self, prompt: list[int], *, engines: tuple[int, ...] = (0, 1)) -> Sequence:
        sequence = Sequence(
            Request("r", "m", tuple(prompt)),
            ModelRuntime(
                "m", "full", "shared", 1, "base", "base", "full/m", decode_engines=engines
            ),
            lambda event: None,
            order=0,
            seed=0,
            page_size=PAGE,
            end_token_ids=frozenset(),
            on_finish=lambda sequence, reason: None,
        )
        self.router.route(sequence)
        self.prefill[sequence.prefill_engine].num_pending_tokens += sequence.num_uncached
        return sequence

    def work_off(self) -> None:
        for target in self.prefill:
            target.num_pending_tokens = 0


def test_new_sessions_spread() -> None:
    fleet = Fleet()
    engines = [fleet.send([i] * 20).prefill_engine for i in range(6)]
    assert sorted(engines) == [0, 0, 0, 1, 1, 1]
    fleet.work_off()
    # Idle again, and all the same: the one that was sent less.
    assert fleet.send([7] * 40).prefill_engine != fleet.send([8] * 20).prefill_engine


def test_a_fan_out_goes_to_one_engine() -> None:
    """Several models asked at once about one prompt, before any of it is computed."""
    for length in (3, 4, 5, 20, 21):
        fleet = Fleet()
        fleet.send([9] * 3)
        sent = [fleet.send(list(range(length))) for _ in range(8)]
        assert len({sequence.prefill_engine for sequence in sent}) == 1
        assert [sequence.num_uncached for sequence in sent] == [length - 1] + [0] * 7


def test_a_session_stays_until_its_engine_is_overloaded() -> None:
    fleet = Fleet()
    context = list(range(40))
    home = fleet.send(context).prefill_engine
    for turn in range(4):
        fleet.work_off()
        context += [turn] * 6
        # The other engine is idle, this one has other things to do: less than the context is worth.
        fleet.prefill[home].num_pending_tokens = 60
        assert fleet.send(context).prefill_engine == home
    fleet.work_off()
    fleet.prefill[home].num_pending_tokens = 200
    assert fleet.send(context).prefill_engine != home
    # It has the context as well now.
    fleet.work_off()
    fleet.prefill[home].num_pending_tokens = 30
    assert fleet.send(context).prefill_engine != home


def test_pages_that_are_held_count_though_nothing_was_sent() -> None:
    fleet = Fleet()
    prompt = [1, 2, 3, 4, 5, 6, 7]
    probe = fleet.send(prompt)
    other = 1 - probe.prefill_engine
    fresh = Fleet()
    cache = fresh.prefill[other].cache
    cache.release(fill(cache, prompt[:6], probe.root))
    sequence = fresh.send(prompt)
    assert (sequence.prefill_engine, sequence.num_uncached) == (other, 0)


def test_what_was_sent_long_ago_is_forgotten() -> None:
    fleet = Fleet(prefill=1)
    fleet.send([1] * 21)
    assert fleet.send([1] * 21).num_uncached == 0
    for i in range(2, 30):
        fleet.send([i] * 21)
    assert len(fleet.router._sent[0]) <= NUM_PAGES
    assert fleet.send([1] * 21).num_uncached == 20


def test_decode_load_counts_what_is_on_its_way() -> None:
    """A burst is spread before anything of it has arrived."""
    fleet = Fleet()
    sent = [fleet.send([i] * 10) for i in range(6)]
    assert sorted(sequence.decode_engine for sequence in sent) == [0, 0, 0, 1, 1, 1]
    for sequence in sent:
        if sequence.decode_engine == 1:
            fleet.router.forget(sequence)
            fleet.router.forget(sequence)
    assert [fleet.send([9] * 10).decode_engine for _ in range(3)] == [1, 1, 1]


def test_decode_prefers_the_pool_that_has_the_prompt() -> None:
    fleet = Fleet()
    probe = fleet.send([1] * 9)
    fleet = Fleet()
    fleet.decode[1].release(fill(fleet.decode[1], [1] * 8, probe.root))
    assert fleet.send([1] * 9).decode_engine == 1
    assert fleet.send([2] * 9).decode_engine == 0


def test_a_model_decodes_where_it_is_hosted() -> None:
    fleet = Fleet()
    assert {fleet.send([i] * 9, engines=(1,)).decode_engine for i in range(4)} == {1}


def test_routing_again_leaves_the_old_engine() -> None:
    fleet = Fleet()
    sequence = fleet.send([1] * 10)
    first = sequence.decode_engine
    for _ in range(3):
        fleet.router.route(sequence)
        assert sequence.decode_engine == first
    assert sum(fleet.router._load) == 5
