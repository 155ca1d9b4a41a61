"""The split rule: which tokens of a prompt the prefill module covers, and which are left.

The one implementation, for training, evaluation, serving and replay. A rule is a pure function of
token ids, so that none of them can differ from another. There are three kinds; a certificate
states one, in JSON:

    3                                         the last 3 tokens
    {"last-message": [[1, 4093], [1, 5907]]}  from the last user or tool message on, which begin so
    {"invocation": [27, 91, 198]}             from the last occurrence of these tokens on

A module with an invocation answers as its base does where a prompt has none, as PEFT's activated
LoRA does.
"""

# pyright: standard
# It checks what was read from JSON, whose types are anybody's.

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

LAST_MESSAGE = "last-message"
INVOCATION = "invocation"

_ID = "i"
"""Token ids as 32-bit integers, so that a sequence is searched for as bytes."""
_ID_BYTES = array(_ID).itemsize
_MAX_ID = 2**31 - 1


class Split(msgspec.Struct, frozen=True):
    """How a prompt is split.

    Args:
        covered: positions `0 .. covered - 1` are the prefill module's. The rest, at least one of a
            prompt that is not empty, is the decode module's.
        invoked: whether the decode module's own weights take part; without, it answers as the base.
    """

    covered: int
    invoked: bool = True


class LastTokens(msgspec.Struct, frozen=True, tag="last-tokens"):
    """A decode module reads the last `count` tokens.

    Raises:
        ValueError: less than 1.
    """

    count: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise ValueError(
                f"tail is {self.count!r}, but a decode module reads at least one prompt token"
            )

    def split(self, prompt: Sequence[int]) -> Split:
        """The split of `prompt` (token ids)."""
        return Split(max(len(prompt) - self.count, 0))

    def to_json(self) -> int:
        """As a certificate states it."""
        return self.count


class LastMessage(msgspec.Struct, frozen=True, tag="last-message"):
    """A decode module reads the last user or tool message, and what follows it.

    A prompt without any message, a plain text, is split before its last token.

    Args:
        openings: the token ids with which the base's chat template begins such a message, one
            sequence a role; see `pshare_jax.text.openings`.

    Raises:
        ValueError: there are none, or one that is no sequence of token ids.
    """

    openings: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not isinstance(self.openings, tuple) or not self.openings:
            raise ValueError(f"tail: {LAST_MESSAGE} needs the token ids that a message begins with")
        for opening in self.openings:
            _check_ids(opening, LAST_MESSAGE)

    def split(self, prompt: Sequence[int]) -> Split:
        """The split of `prompt` (token ids)."""
        ids = _as_bytes(prompt)
        start = max(_last_index(ids, opening) for opening in self.openings)
        return Split(start if start >= 0 else max(len(prompt) - 1, 0))

    def to_json(self) -> dict[str, list[list[int]]]:
        """As a certificate states it."""
        return {LAST_MESSAGE: [list(opening) for opening in self.openings]}


class Invocation(msgspec.Struct, frozen=True, tag="invocation"):
    """A LoRA module reads the last occurrence of `sequence` in the prompt, and what follows it.

    Raises:
        ValueError: no sequence of token ids.
    """

    sequence: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_ids(self.sequence, INVOCATION)

    def split(self, prompt: Sequence[int]) -> Split:
        """The split of `prompt` (token ids)."""
        start = _last_index(_as_bytes(prompt), self.sequence)
        if start < 0:
            return Split(max(len(prompt) - 1, 0), invoked=False)
        return Split(start)

    def to_json(self) -> dict[str, list[int]]:
        """As a certificate states it."""
        return {INVOCATION: list(self.sequence)}


SplitRule = LastTokens | LastMessage | Invocation

LAST_TOKEN = LastTokens()
"""The paper's split, and what a module has that states none."""

TailSetting = int | Literal["last-message"] | dict[str, list[int]]
"""A rule as a configuration asks for it: as in a certificate, but that `last-message` is a word,
whose openings follow from the base's chat template (`pshare_jax.text.openings`)."""


def parse_rule(value: Any) -> SplitRule:
    """The inverse of `to_json`.

    Raises:
        ValueError: not one of the three forms; says what it is instead.
    """
    if isinstance(value, int):
        return LastTokens(value)
    if isinstance(value, dict) and len(value) == 1:
        [(kind, ids)] = value.items()
        if kind == LAST_MESSAGE and isinstance(ids, list):
            return LastMessage(tuple(tuple(i) if isinstance(i, list) else i for i in ids))
        if kind == INVOCATION and isinstance(ids, list):
            return Invocation(tuple(ids))
    raise ValueError(
        f"tail is {value!r}, but must be a number of tokens, "
        f'{{"{LAST_MESSAGE}": [token ids, ...]}} or {{"{INVOCATION}": token ids}}'
    )


def _check_ids(ids: Any, kind: str) -> None:
    if not isinstance(ids, tuple) or not ids or not all(map(_is_id, ids)):
        raise ValueError(f"tail: {kind} has {ids!r}, which is not a sequence of token ids")


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_ID


def _as_bytes(ids: Sequence[int]) -> bytes:
    return array(_ID, ids).tobytes()


def _last_index(ids: bytes, sequence: Sequence[int]) -> int:
    """Where `sequence` occurs last in the ids of `_as_bytes`; -1 without."""
    wanted = _as_bytes(sequence)
    end = len(ids)
    while (start := ids.rfind(wanted, 0, end)) >= 0:
        if start % _ID_BYTES == 0:
            return start // _ID_BYTES
        # These bytes belong to parts of other ids; an earlier match may be a true one.
        end = start + len(wanted) - 1
    return -1
