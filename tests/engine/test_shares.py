"""A slot that a flood gives back: what is replayed later is answered as the oracle does."""

from __future__ import annotations

import msgspec

from pshare_jax.core.requests import Owner
from tests.engine.harness import Client, Models, in_thread_of, wait_until


def test_who_gives_a_slot_back_goes_on_where_it_was(client: Client, models: Models) -> None:
    core = client.engine.workers.decode[0].core
    before = client.engine.stats().preemptions.get("lora", 0)

    def make_room() -> bool:
        """As for another request, once some of the flood have got tokens."""
        rows = [row for row in core.rows.all() if row.output]
        newcomer = [msgspec.structs.replace(r.sequence, owner=Owner("small")) for r in rows[:1]]
        return len(rows) >= 4 and core.rows.make_room(newcomer[0])

    prompts = [[9, 8, 7, i] for i in range(20)]
    flood = [client.submit("lora", p, 24, owner=Owner(request="flood")) for p in prompts]
    small = client.submit("lora", [1, 2], 2, owner=Owner(request="small"))
    wait_until(lambda: in_thread_of(client, "decode0", make_room))
    assert client.engine.stats().preemptions["lora"] > before
    for prompt, reply in zip(prompts, flood, strict=True):
        assert reply.wait().tokens == models.expected("lora", prompt, 24)
    assert small.wait().tokens == models.expected("lora", [1, 2], 2)
    client.check_idle()
