"""What a decode module keeps of its own tokenizer: its chat template and its end tokens.

The tokens themselves are the base's, whose KV is named by them. An instruct model on a foundation
base has a template that the base lacks, and ends its replies with a token that the base never
writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pshare_jax.convert.hf_tokenizer import (
    CONFIG_FILE,
    GENERATION_FILE,
    TEMPLATE_FILE,
    TEMPLATE_FOLDER,
    TOKENIZER_CONFIG_FILE,
)
from pshare_jax.convert.manifest import TOKENIZER_FILE, TOKENIZER_FOLDER, Manifest, read_json
from pshare_jax.core.split_rule import LastMessage, SplitRule
from pshare_jax.errors import CheckpointError
from pshare_jax.text.tokenizer import Tokenizer

DEFAULT = "default"
MAX_TEMPLATE_BYTES = 1 << 20
"""Published ones have some 20 KB at most."""


def own_tokenizer_files(folder: Path, base: Manifest) -> dict[str, bytes]:
    """The files by which a fine-tune's tokenizer differs from its base's, by path below a folder.

    Args:
        folder: of a fine-tune or an adapter, which may have no tokenizer at all.
        base: the prefill checkpoint.

    Raises:
        CheckpointError: a file that cannot be read; or the template or an end token needs a token
            that the base's tokenizer does not have under the same id.
    """
    names = (TEMPLATE_FILE, TOKENIZER_CONFIG_FILE, GENERATION_FILE, CONFIG_FILE)
    if not any((folder / name).is_file() for name in names):
        return {}
    tokenizer = Tokenizer.load(base.folder / TOKENIZER_FOLDER)
    templates = _templates(folder)
    ends = _end_ids(folder, tokenizer)
    _check_tokens(folder, templates, ends, tokenizer)
    files: dict[str, bytes] = {}
    if templates and templates != tokenizer.chat_templates:
        files[TEMPLATE_FILE] = templates[DEFAULT].encode()
        for name, template in templates.items():
            if name != DEFAULT:
                files[f"{TEMPLATE_FOLDER}/{name}.jinja"] = template.encode()
    if set(ends) - set(tokenizer.eos_token_ids):
        files[GENERATION_FILE] = json.dumps({"eos_token_id": ends}).encode()
    return files


def check_rule(folder: Path, files: Mapping[str, bytes], rule: SplitRule) -> None:
    """Refuses a rule that goes by the base's chat template for a module with one of its own.

    Raises:
        CheckpointError: see above.
    """
    if TEMPLATE_FILE in files and isinstance(rule, LastMessage):
        raise CheckpointError(
            f"{folder}: has a chat template of its own, but the tail last-message goes by the "
            "base's; say a number of tokens, or remove its chat template"
        )


def exported_files(base: Mapping[str, bytes], module: Path) -> dict[str, bytes]:
    """The base's tokenizer files with those of a decode module's checkpoint in their place."""
    own = module / TOKENIZER_FOLDER
    paths = [path for path in sorted(own.rglob("*")) if path.is_file()]
    files = {path.relative_to(own).as_posix(): path.read_bytes() for path in paths}
    merged = {**base, **files}
    if GENERATION_FILE in files and GENERATION_FILE in base:
        about = {**json.loads(base[GENERATION_FILE]), **json.loads(files[GENERATION_FILE])}
        merged[GENERATION_FILE] = json.dumps(about).encode()
    return merged


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _templates(folder: Path) -> dict[str, str]:
    """Chat templates by name; empty without a default one."""
    stated = _optional(folder / TOKENIZER_CONFIG_FILE).get("chat_template")
    if isinstance(stated, str):
        stated = [{"name": DEFAULT, "template": stated}]
    templates: dict[str, str] = {}
    for entry in stated if isinstance(stated, list) else []:
        if isinstance(entry, Mapping) and isinstance(entry.get("template"), str):
            templates[str(entry.get("name"))] = entry["template"]
    paths = {DEFAULT: folder / TEMPLATE_FILE}
    paths |= {path.stem: path for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
    for name, path in paths.items():
        if path.is_file():
            if (size := path.stat().st_size) > MAX_TEMPLATE_BYTES:
                raise CheckpointError(f"{path}: has {size} bytes, which no chat template has")
            try:
                templates[name] = path.read_text()
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return templates if DEFAULT in templates else {}


def _end_ids(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """What ends a reply: as the generation configuration says, or else the model's, or else the
    tokenizer's end token."""
    for name in (GENERATION_FILE, CONFIG_FILE):
        stated = _optional(folder / name).get("eos_token_id")
        ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise CheckpointError(f"{folder / name}: eos_token_id is no id or list of ids")
        if ids:
            return ids
    token = _optional(folder / TOKENIZER_CONFIG_FILE).get("eos_token")
    token = token.get("content") if isinstance(token, Mapping) else token
    known = tokenizer.token_id(token) if isinstance(token, str) else None
    return [] if known is None else [known]


def _check_tokens(
    folder: Path, templates: Mapping[str, str], ends: list[int], tokenizer: Tokenizer
) -> None:
    """Control tokens that a template spells out must be the base's too."""
    added = _optional(folder / TOKENIZER_FILE).get("added_tokens")
    for entry in added if isinstance(added, list) else []:
        token, number = entry.get("content"), entry.get("id")
        if not isinstance(token, str) or tokenizer.token_id(token) == number:
            continue
        if number in ends or any(token in template for template in templates.values()):
            raise CheckpointError(
                f"{folder / TOKENIZER_FILE}: token {token!r} is {number}, which the fine-tune's "
                f"template or its end needs, but {tokenizer.token_id(token)} in the base's "
                "tokenizer; import the base with the fine-tune's tokenizer files beside its weights"
            )
    if ends and max(ends) >= tokenizer.vocab_size:
        raise CheckpointError(f"{folder}: end token {max(ends)} is no token of the base's")
