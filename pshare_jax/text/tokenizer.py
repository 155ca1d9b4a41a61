"""A checkpoint's tokenizer: text to ids and back, and the chat template."""

# transformers says the types of its tokenizers in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import copy
import functools
import inspect
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pshare_jax.errors import CheckpointError, RequestError
from pshare_jax.text.detokenizer import IncrementalDetokenizer, decode
from pshare_jax.text.literal import LiteralEncoder
from pshare_jax.text.token_bytes import TokenBytes, read_token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = Mapping[str, Any]


def check_unicode(text: str) -> None:
    """Checks that a text can be encoded.

    Raises:
        RequestError: it holds a lone surrogate, which no encoding has.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the text is not valid Unicode: {error.reason}") from error


class Tokenizer:
    """Wraps a Hugging Face fast tokenizer; safe to use from several threads.

    Args:
        backend: the Hugging Face tokenizer.
        eos_token_ids: ids that end a sequence; those that no token has end nothing.
        generation_config: the checkpoint's `generation_config.json`.

    Attributes:
        vocab_size: number of ids, added tokens included.
        eos_token_ids: ids that end a sequence.
        generation_config: how the model's makers would have it sampled, unchecked.
        special_ids: ids of special tokens, which `skip_special_tokens` leaves out of a text.
    """

    def __init__(
        self,
        backend: PreTrainedTokenizerFast,
        eos_token_ids: tuple[int, ...],
        generation_config: Mapping[str, Any] | None = None,
    ):
        self.generation_config = generation_config or {}
        self._hf = backend
        self._fast = backend.backend_tokenizer
        # Settings for training batches that a tokenizer.json may carry would alter prompts.
        self._fast.no_truncation()
        self._fast.no_padding()
        self.vocab_size = max(self._fast.get_vocab(with_added_tokens=True).values()) + 1
        self.eos_token_ids = self._of_tokens(eos_token_ids)
        added = self._fast.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        specials = sorted((added[i].content for i in self.special_ids), key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, specials))) if specials else None
        self._token_bytes: TokenBytes = read_token_bytes(
            json.loads(self._fast.decoder.__getstate__()),
            map(self._fast.id_to_token, range(self.vocab_size)),
        )
        longest = max(map(len, self._token_bytes.table))
        # A normalizer or an unknown token can shrink a text by any factor.
        bounded = self._fast.normalizer is None and self._fast.model.unk_token is None
        self._longest_token = longest if bounded else None

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Reads `tokenizer.json` and, when there, `tokenizer_config.json`, the chat template and
        `generation_config.json` of `folder`.

        Raises:
            CheckpointError: a missing or malformed file, or an unsupported tokenizer.
        """
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise CheckpointError(f"{folder / 'tokenizer.json'}: no such file")
        # Without torch transformers says at import that models are missing; only its tokenizers
        # are used here.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import PreTrainedTokenizerFast

        try:
            backend = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            path = folder / "generation_config.json"
            generation: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
            eos = _eos_token_ids(path, generation.get("eos_token_id"), backend.eos_token_id)
            return cls(backend, eos, generation)
        except CheckpointError:
            raise
        except Exception as error:  # the Rust parser raises plain Exception
            raise CheckpointError(f"{folder}: not a readable tokenizer: {error}") from error

    def of_module(self, folder: Path | None) -> Tokenizer:
        """The same tokens with the chat template and end tokens of a decode module.

        What ends a reply of the base ends one of the module too.

        Args:
            folder: of files as `load` reads them, each of which may be missing; None for none.

        Raises:
            CheckpointError: a malformed file.
        """
        if folder is None:
            return self
        own = copy.copy(self)
        try:
            further = sorted((folder / "additional_chat_templates").glob("*.jinja"))
            paths = {"default": folder / "chat_template.jinja", **{p.stem: p for p in further}}
            templates = {name: p.read_text() for name, p in paths.items() if p.is_file()}
            path = folder / "generation_config.json"
            generation: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
            ends = _eos_token_ids(path, generation.get("eos_token_id"), None)
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{folder}: not a readable tokenizer: {error}") from error
        if templates:
            own._hf = copy.copy(self._hf)
            own._hf.chat_template = (
                templates if len(templates) > 1 else templates.get("default", "")
            )
        own.eos_token_ids = self._of_tokens(tuple(dict.fromkeys((*ends, *self.eos_token_ids))))
        return own

    def _of_tokens(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Those ids that tokens may have."""
        return tuple(i for i in ids if 0 <= i < self.vocab_size)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens are the ones the tokenizer puts around a text.

        Raises:
            RequestError: `text` holds a lone surrogate, which no encoding has.
        """
        check_unicode(text)
        # The batch call releases the GIL and computes no offsets.
        return self._fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    @property
    def special_pattern(self) -> re.Pattern[str] | None:
        """Finds special tokens that are spelled out in a text; None if there are none."""
        return self._special_pattern

    @cached_property
    def literal(self) -> LiteralEncoder:
        """Encodes texts in which special tokens are letters."""
        return LiteralEncoder(self._fast)

    def min_tokens(self, text: str) -> int:
        """A lower bound of the number of tokens of `text`, without tokenising it."""
        if self._longest_token is None:
            return 0
        return len(text) // self._longest_token

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; ids without a token give none, invalid UTF-8 gives U+FFFD."""
        return decode(self._token_bytes, ids, self.special_ids if skip_special_tokens else ())

    def detokenizer(
        self, skip_special_tokens: bool = True, shown: Iterable[str] = ()
    ) -> IncrementalDetokenizer:
        """A decoder of one token stream, equal to `decode` of the whole.

        Args:
            skip_special_tokens: leaves special tokens out of the text.
            shown: those that are not left out; what is no token does not matter.
        """
        skip = self.special_ids if skip_special_tokens else frozenset[int]()
        skip -= {self._fast.token_to_id(token) for token in shown}
        return IncrementalDetokenizer(self._token_bytes, skip)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; empty for an id without a token."""
        table = self._token_bytes.table
        return table[token_id] if 0 <= token_id < len(table) else b""

    def token_id(self, token: str) -> int | None:
        """The id of the token that the vocabulary spells so; None if there is none."""
        return self._fast.token_to_id(token)

    def token_text(self, token_id: int) -> str:
        r"""A printable name of one token: its text, or `bytes:\xe2\x82` for part of a character."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def token_string(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it, or None for an id without a token."""
        return self._fast.id_to_token(token_id)

    @property
    def chat_template(self) -> str:
        """Source of the chat template that requests with tools get; empty if there is none."""
        if not self.has_chat_template:
            return ""
        return self._hf.get_chat_template(tools=[{}])

    @property
    def chat_templates(self) -> dict[str, str]:
        """Sources of all chat templates by name, of which `default` is the usual one."""
        stated = self._hf.chat_template
        return dict(stated) if isinstance(stated, dict) else {"default": stated} if stated else {}

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint came with a chat template."""
        return bool(self._hf.chat_template)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Renders `messages` with the checkpoint's chat template, in transformers' Jinja sandbox.

        The template writes the special tokens, so the text is to be encoded without any.

        Args:
            messages: `role` and `content`, and what else the template reads.
            tools: JSON schemas of functions, handed to the template.
            add_generation_prompt: ends the text with the start of an assistant message.
            template_kwargs: more variables of the template.

        Raises:
            RequestError: no template, or one that refuses or fails on these messages.
        """
        if not self.has_chat_template:
            raise RequestError(
                "the model has no chat template; use /v1/completions", param="messages"
            )
        variables = dict(template_kwargs or {})
        if reserved := sorted(_reserved_variables() & set(variables)):
            raise RequestError(
                f"chat_template_kwargs may not set {', '.join(reserved)}",
                param="chat_template_kwargs",
            )
        try:
            text = self._hf.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **variables,
            )
        except Exception as error:  # a template can raise anything on data it did not expect
            raise RequestError(
                f"the chat template cannot render these messages: {error}", param="messages"
            ) from error
        assert isinstance(text, str)
        return text


@functools.cache
def _reserved_variables() -> frozenset[str]:
    from transformers import PreTrainedTokenizerFast

    arguments = inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters
    return frozenset(arguments) | {"messages"}


def _eos_token_ids(path: Path, declared: Any, default: int | None) -> tuple[int, ...]:
    if declared is None:
        declared = default
    ids = [] if declared is None else declared if isinstance(declared, list) else [declared]
    if not all(isinstance(token_id, int) for token_id in ids):
        raise CheckpointError(f"{path}: eos_token_id must be an integer or a list of integers")
    return tuple(ids)
