"""The tokenizer of a Hugging Face folder: its files, and what in them must be one answer.

`add_bos_token` and `add_eos_token` of `tokenizer_config.json` decide, where they are stated, what
is put around a text. That is what a GGUF file of the same model says too, whereas `tokenizer.json`
alone may say otherwise.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from pshare_jax.convert.files import one_line
from pshare_jax.convert.manifest import TOKENIZER_FILE, read_json
from pshare_jax.errors import CheckpointError, printable

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    TEMPLATE_FILE,
    GENERATION_FILE,
)
MAX_BYTES = 1 << 28
"""Of one file; the largest `tokenizer.json` of a published model has about 40 MB."""

PATTERNS = (*TOKENIZER_FILES, f"{TEMPLATE_FOLDER}/*.jinja")
"""What of a repository on the hub is its tokenizer."""


def read_tokenizer_folder(folder: Path, vocab_size: int) -> dict[str, bytes]:
    """The tokenizer files of a Hugging Face folder, by path below it.

    Makes sure that the end tokens are declared, and that `tokenizer.json` puts around a text what
    `tokenizer_config.json` says.

    Args:
        folder: the folder.
        vocab_size: rows of the model's embedding.

    Raises:
        CheckpointError: no `tokenizer.json` or one that is malformed; more tokens than rows; a BOS
            or EOS token that is to be added, but is not declared.
    """
    if not (folder / TOKENIZER_FILE).is_file():
        raise CheckpointError(
            f"{folder / TOKENIZER_FILE}: no such file; save the tokenizer as a fast tokenizer first"
        )
    paths = [folder / name for name in TOKENIZER_FILES]
    paths += sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
    paths = [path for path in paths if path.is_file()]
    for path in paths:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise CheckpointError(f"{path}: has {size} bytes, but may have {MAX_BYTES}")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    tokenizer = _parse(folder / TOKENIZER_FILE, files[TOKENIZER_FILE])
    _check_vocabulary(folder, tokenizer, vocab_size)
    about = read_json(folder / TOKENIZER_CONFIG_FILE) if TOKENIZER_CONFIG_FILE in files else {}
    special = read_json(folder / SPECIAL_TOKENS_FILE) if SPECIAL_TOKENS_FILE in files else {}
    if _put_around(folder, tokenizer, {**special, **about}):
        files[TOKENIZER_FILE] = tokenizer.to_str(pretty=True).encode()
    generation = read_json(folder / GENERATION_FILE) if GENERATION_FILE in files else {}
    if generation.get("eos_token_id") is None:
        eos = read_json(folder / CONFIG_FILE).get("eos_token_id")
        if eos is not None:
            files[GENERATION_FILE] = json.dumps({**generation, "eos_token_id": eos}).encode()
    return with_default_template(files, about)


def with_default_template(
    files: Mapping[str, bytes], tokenizer_config: Mapping[str, Any]
) -> dict[str, bytes]:
    """`files` with the default chat template where transformers finds it beside further ones.

    It then reads `chat_template.jinja` alone and forgets the template of `tokenizer_config.json`.
    """
    template = tokenizer_config.get("chat_template")
    further = any(name.startswith(f"{TEMPLATE_FOLDER}/") for name in files)
    if further and TEMPLATE_FILE not in files and isinstance(template, str):
        return {**files, TEMPLATE_FILE: template.encode()}
    return dict(files)


def _parse(path: Path, content: bytes) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the Rust library raises plain Exception
        raise CheckpointError(f"{path}: not a readable tokenizer: {one_line(error)}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_vocabulary(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> None:
    token, last = max(
        tokenizer.get_vocab(with_added_tokens=True).items(),
        key=lambda item: item[1],
        default=("", -1),
    )
    if last >= vocab_size:
        raise CheckpointError(
            f"{folder / TOKENIZER_FILE}: has ids up to {last} ({token[:40]!r}), but {CONFIG_FILE} "
            f"says vocab_size {vocab_size}: tokens were added without resizing the model's "
            "embedding; take the tokenizer that the model was trained with, or resize the model "
            "(transformers' resize_token_embeddings) and save both"
        )


def _put_around(folder: Path, tokenizer: Tokenizer, about: Mapping[str, Any]) -> bool:
    """Makes `tokenizer` add what `about` states; returns whether it had to be changed."""
    before, after = _added(tokenizer)
    wanted_before = _wanted(folder, tokenizer, about, "bos", before)
    wanted_after = _wanted(folder, tokenizer, about, "eos", after)
    if (wanted_before, wanted_after) == (before, after):
        return False
    ids = [*wanted_before, *wanted_after]
    tokens = {token_id: tokenizer.id_to_token(token_id) for token_id in ids}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[
            *(tokens[token_id] for token_id in wanted_before),
            "$A",
            *(tokens[token_id] for token_id in wanted_after),
        ],
        special_tokens=[(token, token_id) for token_id, token in tokens.items()],
    )
    logger.warning(
        "%s: %s and %s disagree on the tokens around a text; the former's add_bos_token and "
        "add_eos_token count",
        printable(str(folder)),
        TOKENIZER_CONFIG_FILE,
        TOKENIZER_FILE,
    )
    return True


def _added(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that `tokenizer` puts before and after a text."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a").ids
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


def _wanted(
    folder: Path, tokenizer: Tokenizer, about: Mapping[str, Any], part: str, added: list[int]
) -> list[int]:
    """What is to stand on one side of a text, where `tokenizer.json` puts `added`."""
    stated = about.get(f"add_{part}_token")
    if not isinstance(stated, bool):
        return added
    token = about.get(f"{part}_token")
    if isinstance(token, Mapping):
        token = token.get("content")
    token_id = tokenizer.token_to_id(token) if isinstance(token, str) else None
    if not stated:
        return [other for other in added if other != token_id]
    if token_id is None:
        raise CheckpointError(
            f"{folder / TOKENIZER_CONFIG_FILE}: add_{part}_token is true, but {part}_token is not "
            "a token of tokenizer.json"
        )
    if token_id in added:
        return added
    return [token_id, *added] if part == "bos" else [*added, token_id]
