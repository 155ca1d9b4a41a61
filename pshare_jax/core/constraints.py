"""What an answer's tokens are restricted to, as requests carry it.

The core passes it on; who knows the tokenizer turns it into masks (`runtime/masks.py`).
"""

from __future__ import annotations

from typing import Literal

import msgspec

GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "lark"]


class GrammarSpec(msgspec.Struct, frozen=True):
    """A grammar as the client wrote it.

    Args:
        kind: of what form it is.
        source: JSON text of the schema or of the list of choices, a regular expression of the whole
            answer, or a grammar in llguidance's dialect of Lark; empty for `json_object`.
    """

    kind: GrammarKind
    source: str = ""


class Thoughts(msgspec.Struct, frozen=True):
    """A grammar's answer comes after thoughts, which are free.

    Args:
        opening: the token that begins them.
        closing: the token that ends them.
        begun: whether the prompt has begun them; else the answer may come at once.
    """

    opening: int
    closing: int
    begun: bool
