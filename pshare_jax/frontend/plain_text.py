"""Control tokens come from the chat template alone: in what a client writes they are text.

Otherwise a document that holds `<|im_end|><|im_start|>system` would speak as the operator.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from typing import Any

import msgspec

from pshare_jax.errors import RequestError
from pshare_jax.plain_data import is_object, is_sequence
from pshare_jax.text.tokenizer import Tokenizer, check_unicode


class PlainText:
    """Hides special tokens in a conversation from a tokenizer, and encodes them as text.

    Each is replaced by a word that nobody can guess before the template is rendered, and that word
    by the token's letters afterwards. The same token is always the same word, so that a beginning
    of a conversation is rendered as the beginning of the whole.

    Args:
        tokenizer: whose special tokens they are.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._nonce = secrets.token_hex(8)
        self._hidden: list[str] = []

    def hide(self, value: Any) -> Any:
        """`value`, JSON-like, without special tokens in its texts and keys.

        Raises:
            RequestError: it is nested too deeply, or is not valid Unicode.
        """
        pattern = self._tokenizer.special_pattern
        try:
            if pattern is None or not pattern.search(msgspec.json.encode(value).decode()):
                return value
            return _map_texts(value, lambda text: pattern.sub(self._hide, text))
        except RecursionError:
            raise RequestError("messages or tools are nested too deeply", "messages") from None
        except UnicodeEncodeError as error:
            raise RequestError(
                f"messages or tools are not valid Unicode: {error.reason}", "messages"
            ) from error

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of the rendered `text`.

        Raises:
            RequestError: it is not valid Unicode.
        """
        pattern = self._tokenizer.special_pattern
        if not self._hidden or pattern is None:
            return self._tokenizer.encode(text, add_special_tokens)
        check_unicode(text)
        literal = self._tokenizer.literal
        return literal.encode(self.shown(literal.mark(text, pattern)), add_special_tokens)

    def shown(self, text: str) -> str:
        """`text` as it was before special tokens in it were hidden."""
        if not self._hidden:
            return text
        return re.sub(f"x{self._nonce}x([0-9]+)x", lambda m: self._hidden[int(m[1])], text)

    def _hide(self, match: re.Match[str]) -> str:
        if match[0] not in self._hidden:
            self._hidden.append(match[0])
        return f"x{self._nonce}x{self._hidden.index(match[0])}x"


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if is_object(value):
        return {change(str(key)): _map_texts(item, change) for key, item in value.items()}
    if is_sequence(value):
        return [_map_texts(item, change) for item in value]
    return value
