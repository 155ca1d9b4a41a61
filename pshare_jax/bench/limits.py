"""What sharing can give at most: token counts of a session, rho, G_max. Pure functions.

A session makes calls over one growing context; `Call` names a call's model and its prompt length.
The baseline gives every model a prefix cache of its own that never forgets; sharing gives all
models one. Neither keeps KV that a decode module wrote: generated tokens are prefilled once more,
as part of the next prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Call:
    """One call of a session: the model's number, and its prompt in tokens."""

    model: int
    prompt: int


def kv_bytes_per_token(layers: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes of K and V of one token: 2 * layers * kv_heads * head_dim * itemsize."""
    return 2 * layers * kv_heads * head_dim * itemsize


def shared_prefill_tokens(calls: Iterable[Call]) -> int:
    """Tokens that one prefill for all models computes: the longest prompt.

    Raises:
        ValueError: no calls.
    """
    return max(call.prompt for call in calls)


def isolated_prefill_tokens(calls: Iterable[Call]) -> int:
    """Tokens that a prefill for each model computes: the sum of each model's longest prompt."""
    longest: dict[int, int] = {}
    for call in calls:
        longest[call.model] = max(call.prompt, longest.get(call.model, 0))
    return sum(longest.values())


def rho(calls: Sequence[Call]) -> float:
    """How many times the shared prefill's tokens the isolated ones compute; at most the models.

    Raises:
        ValueError: no calls.
    """
    return isolated_prefill_tokens(calls) / shared_prefill_tokens(calls)


def rho_in_turn(models: int, turns: int, first: int, growth: int) -> float:
    """rho of models called in turn: M - g M (M - 1) / (2 c_last), c_last = n0 + (M T - 1) g.

    Args:
        models: M.
        turns: T, calls of each model.
        first: n0, tokens of the first prompt.
        growth: g, tokens that each call adds to the context.
    """
    last = first + (models * turns - 1) * growth
    return models - growth * models * (models - 1) / (2 * last)


def g_max(rho: float, prefill: float, decode: float) -> float:
    """The most that sharing can give to throughput: (rho A + D) / (A + D).

    It holds for one device that does both, and for several that are split between prefill and
    decode in the best proportion for each mode. More is possible only when the baseline's caches
    forget.

    Args:
        rho: isolated over shared prefill work.
        prefill: A, seconds of shared prefill of a session.
        decode: D, seconds of decode of a session.

    Raises:
        ValueError: a negative time, or no time at all.
    """
    if prefill < 0 or decode < 0 or prefill + decode == 0:
        raise ValueError(f"prefill {prefill} s and decode {decode} s are not a session's times")
    return (rho * prefill + decode) / (prefill + decode)


def split_throughput(prefill: float, decode: float, prefill_share: float) -> float:
    """Sessions a second of one device's worth of hardware, a share of which only prefills.

    The slower side sets the rate. Its largest value over all shares is 1 / (A + D).

    Args:
        prefill: A, seconds of prefill of a session on all of the hardware.
        decode: D, seconds of decode of a session on all of the hardware.
        prefill_share: between 0 and 1, both excluded.

    Raises:
        ValueError: a share that leaves one side without hardware, or no work at all.
    """
    if not 0 < prefill_share < 1:
        raise ValueError(f"the prefill share must lie between 0 and 1, got {prefill_share}")
    slowest = max(prefill / prefill_share, decode / (1 - prefill_share))
    if slowest <= 0:
        raise ValueError("a session without work has no throughput")
    return 1 / slowest
