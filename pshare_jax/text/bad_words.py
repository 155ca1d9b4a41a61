"""Words that must not come, as token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pshare_jax.errors import RequestError

MAX_BAD_WORDS = 256
"""Each is looked for in every step."""

MAX_WORD_CHARS = 256


def bad_word_ids(
    words: Sequence[str] | None, encode: Callable[[str], Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """The token ids of each word, as it is and after a space, as in vLLM.

    Args:
        words: as clients write them.
        encode: token ids of a text, without special tokens around it.

    Raises:
        RequestError: a word without tokens or too long a one, or too many words.
    """
    if words is not None and len(words) > MAX_BAD_WORDS:
        raise RequestError(
            f"bad_words may hold at most {MAX_BAD_WORDS} words, got {len(words)}", param="bad_words"
        )
    found: list[tuple[int, ...]] = []
    for word in words or ():
        if len(word) > MAX_WORD_CHARS:
            raise RequestError(
                f"a word of bad_words may have at most {MAX_WORD_CHARS} characters, got "
                f"{len(word)}",
                param="bad_words",
            )
        plain = tuple(encode(word))
        if not plain:
            raise RequestError("bad_words must hold no empty word", param="bad_words")
        found.append(plain)
        spaced = tuple(encode(" " + word.lstrip()))
        if len(spaced) == len(plain) and spaced[0] != plain[0]:
            found.append(spaced)
    return tuple(found)
