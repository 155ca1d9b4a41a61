"""Texts in which control tokens are letters, unless they are marked."""

# tokenizers does not say its types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import re
import secrets
from typing import Any


class LiteralEncoder:
    """Encodes texts in which a special token that is spelled out is text like any other.

    Marks stand for special tokens: words that nobody can guess, added to a copy of the tokenizer in
    the place of the tokens. A text is encoded as one, so that what a tokenizer does at the
    beginning of a text, or beside a special token, is done there and nowhere else.

    Args:
        fast: a `tokenizers.Tokenizer`, which is left as it is.
    """

    def __init__(self, fast: Any):
        # Imported late: who only knows of tokenizers does without the package.
        from tokenizers import AddedToken

        self._fast = type(fast).from_str(fast.to_str())
        self._fast.no_truncation()
        self._fast.no_padding()
        # Special tokens are letters from now on; marks, which are no special ones, are not.
        self._fast.encode_special_tokens = True
        nonce = secrets.token_hex(16)
        added = fast.get_added_tokens_decoder()
        special = {i: token for i, token in added.items() if token.special}
        self._leave_ids_alone(nonce)
        self._marks = {token.content: f"x{nonce}x{i}x" for i, token in special.items()}
        self._fast.add_tokens(
            [
                AddedToken(
                    self._marks[token.content],
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized,
                    special=False,
                )
                for token in special.values()
            ]
        )
        self._ids = {
            self._fast.token_to_id(self._marks[token.content]): i for i, token in special.items()
        }

    def _leave_ids_alone(self, nonce: str) -> None:
        """Has tokens that are added from now on get ids that no token has.

        They are numbered from the vocabulary's size on, where a vocabulary with gaps has tokens.
        """
        vocabulary = self._fast.get_vocab(with_added_tokens=True)
        missing = max(vocabulary.values()) + 1 - len(vocabulary)
        self._fast.add_tokens([f"x{nonce}x{i}f" for i in range(missing)])

    def mark(self, text: str, pattern: re.Pattern[str]) -> str:
        """`text` with marks for the special tokens in it.

        Args:
            text: to be encoded.
            pattern: finds special tokens.
        """
        return pattern.sub(lambda match: self._marks[match[0]], text)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`; those of its marks are the special tokens'."""
        # The batch call releases the GIL.
        [encoded] = self._fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return [self._ids.get(i, i) for i in encoded.ids]
