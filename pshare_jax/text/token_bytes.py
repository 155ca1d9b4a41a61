"""What each token stands for, as bytes: read off the tokenizer's decoder once, at load.

With a table of bytes, decoding is concatenation followed by one UTF-8 decoding, which can be done
incrementally. Two families are covered: byte-level BPE (GPT-2's byte alphabet, as in Llama 3 and
Qwen) and SentencePiece with byte fallback (as in Llama 2 and Mistral).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pshare_jax.errors import CheckpointError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

Step = Callable[[str], str | bytes]


@dataclass(frozen=True)
class TokenBytes:
    """The bytes of every token, and how a decoded text starts.

    Args:
        table: bytes of token i at index i; empty for ids that no token has.
        strip: leading characters equal to `strip_char` that the start of a text loses.
        strip_char: the character that is stripped, usually a space.
    """

    table: Sequence[bytes]
    strip: int = 0
    strip_char: str = " "


def byte_alphabet() -> dict[str, int]:
    """GPT-2's byte alphabet (Radford et al., 2019): printable character -> byte.

    Printable Latin-1 bytes stand for themselves; the others take characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet


def read_token_bytes(decoder: Mapping[str, Any], tokens: Iterable[str | None]) -> TokenBytes:
    """Builds the table from `decoder`, the JSON form of a tokenizer's decoder.

    Args:
        decoder: the `decoder` object of a `tokenizer.json`.
        tokens: the token string of id 0, 1, ...; None where there is none.

    Raises:
        CheckpointError: a decoder whose output is not a concatenation of its tokens' bytes.
    """
    steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    convert: list[Step] = []
    strip, strip_char = 0, " "
    fused = False
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                convert.append(_byte_level(byte_alphabet()))
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                convert.append(_replace(old, new))
            case {"type": "ByteFallback"}:
                convert.append(_byte_fallback)
            case {"type": "Metaspace", "replacement": old}:
                convert.append(_replace(old, " "))
                strip = 0 if step.get("prepend_scheme") == "never" else 1
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": content, "start": start, "stop": 0} if fused:
                strip, strip_char = start, content
            case _:
                raise CheckpointError(
                    f"tokenizer.json: decoder step {step} is not supported; "
                    "byte-level BPE and SentencePiece with byte fallback are"
                )
    return TokenBytes([_apply(convert, token) for token in tokens], strip, strip_char)


def _apply(steps: Sequence[Step], token: str | None) -> bytes:
    text: str | bytes = token or ""
    for step in steps:
        if isinstance(text, bytes):
            return text
        text = step(text)
    return text if isinstance(text, bytes) else text.encode()


def _byte_level(alphabet: Mapping[str, int]) -> Step:
    def convert(token: str) -> bytes:
        # Added tokens may hold characters outside the alphabet: they stand for themselves.
        if all(char in alphabet for char in token):
            return bytes(alphabet[char] for char in token)
        return token.encode()

    return convert


def _replace(old: str, new: str) -> Step:
    return lambda token: token.replace(old, new)


def _byte_fallback(token: str) -> str | bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token
