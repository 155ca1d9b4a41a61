"""Sequences as the dispatcher makes them, without one."""

from __future__ import annotations

from pshare_jax.core.pages.prefix_index import block_key, block_keys, root_key
from pshare_jax.core.requests import SamplingParams
from pshare_jax.core.sequences import Sequence


def make_sequence(
    id: int,
    prompt: list[int],
    *,
    page_size: int,
    order: int | None = None,
    model: str = "lora",
    output: tuple[int, ...] = (),
    max_tokens: int = 16,
    end_token_ids: frozenset[int] = frozenset(),
    tail: int = 1,
) -> Sequence:
    """A sequence whose last `tail` prompt tokens are the decode module's; `order` is `id` if not
    given."""
    root = root_key("base", "")
    covered = len(prompt) - tail
    keys = block_keys(root, prompt[:covered], page_size)
    rest = prompt[len(keys) * page_size : covered]
    return Sequence(
        id=id,
        order=id if order is None else order,
        model=model,
        prompt=tuple(prompt),
        output=output,
        covered=covered,
        root=root,
        keys=keys,
        last_key=block_key(keys[-1] if keys else root, rest),
        params=SamplingParams(max_tokens=max_tokens),
        end_token_ids=end_token_ids,
        prefill_worker="prefill0",
        decode_worker="decode0",
    )
