"""Token ids to text, one token at a time, at a constant cost a token."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Collection, Iterable, Sequence

from pshare_jax.text.token_bytes import TokenBytes

MAX_STOP_STRINGS = 16


class IncrementalDetokenizer:
    """Decodes a token stream; what it returns adds up to the text of the whole sequence.

    A character is returned with the token that completes its UTF-8 encoding; bytes that can no
    longer become valid give U+FFFD each maximal invalid part (Unicode 15, section 3.9), as in a
    decoding of the whole sequence.

    Args:
        token_bytes: the tokenizer's table.
        skip_ids: ids that give no text (special tokens).
    """

    def __init__(self, token_bytes: TokenBytes, skip_ids: Collection[int] = ()):
        self._table = token_bytes.table
        self._skip = skip_ids
        self._strip = token_bytes.strip
        self._strip_char = token_bytes.strip_char
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; ids without a token give none."""
        if token_id in self._skip or not 0 <= token_id < len(self._table):
            return ""
        return self._strip_start(self._utf8.decode(self._table[token_id]))

    def finish(self) -> str:
        """The text of bytes that still waited for the rest of their character."""
        return self._strip_start(self._utf8.decode(b"", final=True))

    def _strip_start(self, text: str) -> str:
        if not self._strip or not text:
            return text
        start = 0
        while start < min(self._strip, len(text)) and text[start] == self._strip_char:
            start += 1
        # Stripping goes on into the next text only while there has been nothing else.
        self._strip = self._strip - start if start == len(text) else 0
        return text[start:]


def decode(token_bytes: TokenBytes, ids: Iterable[int], skip_ids: Collection[int] = ()) -> str:
    """The text of a whole sequence."""
    detokenizer = IncrementalDetokenizer(token_bytes, skip_ids)
    return "".join([*map(detokenizer.push, ids), detokenizer.finish()])


class StopMatcher:
    """Ends a text at the first stop string, holding back what may still become one.

    The first stop string is the one whose last character comes first; of those that end together,
    the longest. So the result does not depend on how the text was cut into pieces. Matching is
    Knuth, Morris and Pratt's (1977): constant amortised cost a character and stop string.

    Args:
        stops: non-empty stop strings.
        include: whether the returned text contains the stop string.

    Attributes:
        matched: the stop string that was found, or None.
    """

    def __init__(self, stops: Sequence[str], include: bool = False):
        self._patterns = [(stop, _failure(stop)) for stop in stops]
        self._states = [0] * len(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, *, may_end: bool = True) -> str:
        """The text that is now safe to return; none after a match.

        A stop string whose last character is in a text that may not end is text as any other.
        """
        if self.matched is not None:
            return ""
        if not self._patterns:
            return text
        text, held = self._held + text, len(self._held)
        for position in range(held, len(text)):
            if (stop := self._advance(text[position])) and may_end:
                self.matched, self._held = stop, ""
                end = position + 1
                return text[: end if self._include else end - len(stop)]
        held = max(
            state if state < len(stop) else failure[-1]
            for state, (stop, failure) in zip(self._states, self._patterns, strict=True)
        )
        safe = len(text) - held
        self._held = text[safe:]
        return text[:safe]

    def finish(self) -> str:
        """The text held back, which did not become a stop string."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str | None:
        found = None
        for index, (stop, failure) in enumerate(self._patterns):
            state = self._states[index]
            if state == len(stop):  # it came where the text might not end
                state = failure[-1]
            while state and stop[state] != char:
                state = failure[state - 1]
            if stop[state] == char:
                state += 1
            self._states[index] = state
            if state == len(stop) and (found is None or len(stop) > len(found)):
                found = stop
        return found


# The samples of a request, and often its successors, share their stop strings.
@functools.lru_cache(maxsize=1024)
def _failure(pattern: str) -> tuple[int, ...]:
    """Length of the longest proper border of each prefix of `pattern`."""
    borders = [0] * len(pattern)
    for i in range(1, len(pattern)):
        border = borders[i - 1]
        while border and pattern[i] != pattern[border]:
            border = borders[border - 1]
        borders[i] = border + (pattern[i] == pattern[border])
    return tuple(borders)
