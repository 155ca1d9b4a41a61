"""The tokenizer in a GGUF file as Hugging Face tokenizer files.

For byte-level BPE (`gpt2`) GGUF stores vocabulary, merges and token types, and only the name of the
pre-tokenizer; the table below spells the names out. The patterns are the published ones of each
model family. For SentencePiece BPE (`llama`) it stores vocabulary and scores, which imply the
merges.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from pshare_jax.convert.files import one_line
from pshare_jax.convert.gguf import GGUFFile
from pshare_jax.convert.hf_tokenizer import TEMPLATE_FOLDER, with_default_template
from pshare_jax.errors import CheckpointError

CONTROL = 3
USER_DEFINED = 4
"""Token types of `tokenizer.ggml.token_type` that are matched in the text before BPE."""

SPACE = "\u2581"
"""SentencePiece's spelling of a space."""

MAX_TOKEN_CHARACTERS = 1024
MAX_CHARACTERS = 1 << 24
"""Of one token, and of a vocabulary. Published ones have 256 and 3 million at most; finding the
merges of SentencePiece takes time with the square of a token's length."""

END_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>")
"""Control tokens that end a reply in the supported families, whichever of them is the EOS token."""

_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LETTERS = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_TEKKEN_PATTERN = f"{_LETTERS}{_UPPER}*{_LOWER}+|{_LETTERS}{_UPPER}+{_LOWER}*" + r"|\p{N}" + _REST
_GPT4O_PATTERN = (
    f"{_LETTERS}{_UPPER}*{_LOWER}+{_SUFFIX}|{_LETTERS}{_UPPER}+{_LOWER}*{_SUFFIX}"
    + r"|\p{N}{1,3}"
    + _REST
)


def _split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, byte_level])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


@dataclass(frozen=True)
class _PreTokenizer:
    """How a family cuts text before BPE.

    `ignore_merges`: a piece that is a token stays whole even if no merges lead to it.
    """

    build: Callable[[], pre_tokenizers.PreTokenizer]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


_LLAMA3 = _PreTokenizer(lambda: _split_by(_LLAMA3_PATTERN), ignore_merges=True, add_bos=True)
_CL100K = _PreTokenizer(lambda: _split_by(_LLAMA3_PATTERN))
_GPT2, _SMOLLM = _PreTokenizer(_gpt2), _PreTokenizer(_smollm)
_GPT4O = _PreTokenizer(lambda: _split_by(_GPT4O_PATTERN))

PRE_TOKENIZERS = {
    **dict.fromkeys(("default", "gpt-2", "olmo", "phi-2"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact"), _SMOLLM),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _CL100K),
    "qwen2": _PreTokenizer(lambda: _split_by(_QWEN2_PATTERN), nfc=True),
    "deepseek-r1-qwen": _PreTokenizer(lambda: _split_by(_QWEN2_PATTERN)),
    "tekken": _PreTokenizer(lambda: _split_by(_TEKKEN_PATTERN), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
}
"""The values of `tokenizer.ggml.pre` that are supported."""


def tokenizer_files(file: GGUFFile) -> dict[str, bytes]:
    """`tokenizer.json`, `tokenizer_config.json` and `generation_config.json` of a GGUF model.

    Raises:
        CheckpointError: no tokenizer, or one of an unknown kind.
    """
    build = _builder(file)
    tokens = file.get("tokenizer.ggml.tokens", list)
    if len(tokens) > file.config.vocab_size:
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.tokens has {len(tokens)} tokens, but tensor "
            f"token_embd.weight only {file.config.vocab_size} rows"
        )
    _check_lengths(file, tokens)
    special = _special_tokens(file, tokens)
    try:
        tokenizer = build(file, tokens)
        _add_special_tokens(file, tokenizer, tokens, special)
    except CheckpointError:
        raise
    except Exception as error:  # the Rust library raises plain Exception
        raise CheckpointError(f"{file.path}: tokenizer is malformed: {one_line(error)}") from error
    about: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.config.max_position_embeddings,
        **special,
    }
    if file.has("tokenizer.chat_template"):
        about["chat_template"] = file.get("tokenizer.chat_template", str)
    generation = {"eos_token_id": _end_ids(file, tokens)}
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(about, indent=2, ensure_ascii=False).encode(),
        "generation_config.json": json.dumps(generation).encode(),
        **_further_templates(file),
    }
    return with_default_template(files, about)


def _further_templates(file: GGUFFile) -> dict[str, bytes]:
    """The named chat templates (`tool_use` and the like), as Hugging Face's folder has them."""
    prefix = "tokenizer.chat_template."
    return {
        f"{TEMPLATE_FOLDER}/{name}.jinja": file.get(prefix + name, str).encode()
        for name in (key.removeprefix(prefix) for key in file.names() if key.startswith(prefix))
        if re.fullmatch(r"[\w-]+", name)
    }


def _check_lengths(file: GGUFFile, tokens: list[Any]) -> None:
    """Refuses what is no vocabulary before anything is computed from it."""
    total = 0
    for i, token in enumerate(tokens):
        if not isinstance(token, str):
            raise CheckpointError(f"{file.path}: tokenizer.ggml.tokens: entry {i} is no text")
        total += len(token)
        if len(token) > MAX_TOKEN_CHARACTERS or total > MAX_CHARACTERS:
            raise CheckpointError(
                f"{file.path}: tokenizer.ggml.tokens: entry {i} has {len(token)} characters, "
                f"{total} with those before; at most {MAX_TOKEN_CHARACTERS} and {MAX_CHARACTERS} "
                "are possible"
            )


def _builder(file: GGUFFile) -> Callable[[GGUFFile, list[str]], Tokenizer]:
    model = file.get("tokenizer.ggml.model", str)
    if model == "llama":
        return _sentencepiece
    if model != "gpt2":
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.model {model!r} is not supported, 'gpt2' and 'llama' "
            "are; import from the Hugging Face folder instead"
        )
    name = _pre_tokenizer_name(file)
    if name not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.pre {name!r} is not supported; supported are "
            f"{', '.join(PRE_TOKENIZERS)}"
        )
    return _byte_level


def _pre_tokenizer_name(file: GGUFFile) -> str:
    return file.get("tokenizer.ggml.pre", str, "default")


def _special_tokens(file: GGUFFile, tokens: list[str]) -> dict[str, str]:
    """The tokens that play a part, by Hugging Face's name of the part."""
    parts = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special: dict[str, str] = {}
    for part, name in parts.items():
        key = f"tokenizer.ggml.{name}_token_id"
        if file.has(key):
            special[f"{part}_token"] = tokens[_token_id(file, key, tokens)]
    return special


def _token_id(file: GGUFFile, key: str, tokens: list[str]) -> int:
    token_id = file.get(key, int)
    if not 0 <= token_id < len(tokens):
        raise CheckpointError(f"{file.path}: metadata {key} is {token_id}: no such token")
    return token_id


def _types(file: GGUFFile, tokens: list[str]) -> list[int]:
    types = file.get("tokenizer.ggml.token_type", list)
    if len(types) != len(tokens):
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} "
            "tokens"
        )
    return types


def _end_ids(file: GGUFFile, tokens: list[str]) -> list[int]:
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    ids = [_token_id(file, key, tokens) for key in keys if file.has(key)]
    types = _types(file, tokens)
    ids += [i for i, kind in enumerate(types) if kind == CONTROL and tokens[i] in END_OF_TURN]
    return list(dict.fromkeys(ids))


def _byte_level(file: GGUFFile, tokens: list[str]) -> Tokenizer:
    family = PRE_TOKENIZERS[_pre_tokenizer_name(file)]
    merges: list[tuple[str, str]] = []
    for line in file.get("tokenizer.ggml.merges", list):
        left, _, right = line.partition(" ")
        merges.append((left, right))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=family.ignore_merges))
    if family.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = family.build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GGUFFile, tokens: list[str]) -> Tokenizer:
    scores = file.get("tokenizer.ggml.scores", list)
    if len(scores) != len(tokens):
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens"
        )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    key = "tokenizer.ggml.unknown_token_id"
    unknown = tokens[_token_id(file, key, tokens)] if file.has(key) else None
    model = models.BPE(
        vocabulary,
        _merges_of(vocabulary, scores),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    replace = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_of(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges that SentencePiece's scores imply: pairs by the score of what they make.

    SentencePiece joins the neighbours whose joint token scores best (Kudo and Richardson, 2018).
    """
    pairs = [
        (-scores[i], vocabulary[token[:cut]], vocabulary[token[cut:]], token, cut)
        for token, i in vocabulary.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    return [(token[:cut], token[cut:]) for *_, token, cut in sorted(pairs)]


def _add_special_tokens(
    file: GGUFFile, tokenizer: Tokenizer, tokens: list[str], special: dict[str, str]
) -> None:
    """Control tokens, and the ones that are put around every text."""
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, _types(file, tokens), strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    if file.get("tokenizer.ggml.model", str) == "llama":
        add_bos = True
    else:
        add_bos = PRE_TOKENIZERS[_pre_tokenizer_name(file)].add_bos
    template, used = ["$A"], []
    if file.get("tokenizer.ggml.add_bos_token", bool, add_bos):
        template.insert(0, _required(file, special, "bos_token"))
        used.append(special["bos_token"])
    if file.get("tokenizer.ggml.add_eos_token", bool, False):
        template.append(_required(file, special, "eos_token"))
        used.append(special["eos_token"])
    if used:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template,
            special_tokens=[(token, tokens.index(token)) for token in set(used)],
        )


def _required(file: GGUFFile, special: dict[str, str], part: str) -> str:
    if part not in special:
        raise CheckpointError(f"{file.path}: the tokenizer adds a {part}, but declares none")
    return special[part]
