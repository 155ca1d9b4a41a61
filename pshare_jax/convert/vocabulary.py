"""Fine-tunes whose vocabulary was resized: rows that are padding, and tokens that the base lacks.

KV is named by tokens, so a base and all its modules have one vocabulary. Rows of a fine-tune beyond
it that no token has are left out; tokens of its own have to be the base's too, which `import` can
take over (`with_vocabulary_of`).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from pshare_jax.convert import hf_tokenizer
from pshare_jax.convert.files import one_line, write_files
from pshare_jax.convert.manifest import TOKENIZER_FILE, read_json
from pshare_jax.convert.sources import Source
from pshare_jax.convert.tensors import LazyTensor
from pshare_jax.errors import CheckpointError, printable

logger = logging.getLogger(__name__)

EMBEDDING, HEAD = "embed.embedding", "lm_head.kernel"
_SHOWN = 5


def untied(model: Source) -> Source:
    """The same model with an output head of its own, for modules that train one."""
    if not model.config.tie_word_embeddings:
        return model
    embedding = model.tensors[EMBEDDING]
    head = LazyTensor(embedding.shape[::-1], embedding.dtype, lambda: embedding.read().T)
    return replace(
        model,
        config=replace(model.config, tie_word_embeddings=False),
        tensors={**model.tensors, HEAD: head},
        hf_config=_stated(model.hf_config, tie_word_embeddings=False),
    )


def _stated(hf_config: Mapping[str, Any] | None, **fields: Any) -> Mapping[str, Any] | None:
    return None if hf_config is None else {**hf_config, **fields}


def with_vocabulary_of(
    model: Source, folder: Path, rows: LazyTensor, head: LazyTensor | None
) -> Source:
    """A base with the tokens and the number of rows that a fine-tune has.

    Rows that no token of the base has are the fine-tune's.

    Args:
        model: the base.
        folder: of the fine-tune, a whole model or an adapter, with its tokenizer.
        rows: its embedding `[more, embed]`.
        head: its output head `[more, embed]`; None where it is the embedding.

    Raises:
        CheckpointError: it has the same tokens, or gives one of the base's another id, or is of
            another width; or its head is not its embedding although the base's is.
    """
    config = model.config
    base, theirs = _base_vocabulary(model), _vocabulary(folder / TOKENIZER_FILE)
    count, more = max(base.values()) + 1, rows.shape[0]
    for token, number in base.items():
        if theirs.get(token) != number:
            raise CheckpointError(
                f"{folder / TOKENIZER_FILE}: token {token!r} is {theirs.get(token)}, but {number} "
                "in the base's tokenizer: it is a tokenizer of another kind"
            )
    if rows.shape[1:] != (config.hidden_size,) or more < count:
        raise CheckpointError(
            f"{folder}: its embedding has shape {list(rows.shape)}, but the base has {count} "
            f"tokens and a width of {config.hidden_size}"
        )
    if theirs == base and more == config.vocab_size:
        raise CheckpointError(f"{folder}: has the tokens of the base, and no others")
    tensors = dict(model.tensors)
    own = tensors[EMBEDDING]
    tensors[EMBEDDING] = _extended(own, rows, count)
    if not config.tie_word_embeddings:
        kernel = tensors[HEAD]
        own = LazyTensor(kernel.shape[::-1], kernel.dtype, lambda: kernel.read().T)
        joined = _extended(own, rows if head is None else head, count)
        tensors[HEAD] = LazyTensor(
            joined.shape[::-1], joined.dtype, lambda: np.ascontiguousarray(joined.read().T)
        )
    elif head is not None and not np.array_equal(head.read()[count:], rows.read()[count:]):
        raise CheckpointError(
            f"{folder}: gives its tokens other rows in the output head than in the embedding, but "
            "the base ties the two: import it with --untie-head too"
        )
    return replace(
        model,
        config=replace(config, vocab_size=more),
        tensors=tensors,
        eight_bits={n: t for n, t in model.eight_bits.items() if not n.startswith(HEAD)},
        tokenizer_files=_tokenizer_files(model, folder, more),
        hf_config=_stated(model.hf_config, vocab_size=more),
    )


def _extended(own: LazyTensor, other: LazyTensor, count: int) -> LazyTensor:
    def read() -> np.ndarray:
        return np.concatenate([own.read()[:count], other.read()[count:].astype(own.dtype)])

    return LazyTensor((other.shape[0], *own.shape[1:]), own.dtype, read)


def _tokenizer_files(model: Source, folder: Path, vocab_size: int) -> dict[str, bytes]:
    """The base's files with the fine-tune's in their place, but for what ends a reply."""
    paths = [folder / name for name in hf_tokenizer.TOKENIZER_FILES]
    paths += sorted((folder / hf_tokenizer.TEMPLATE_FOLDER).glob("*.jinja"))
    own = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in paths
        if path.is_file() and path.name != hf_tokenizer.GENERATION_FILE
    }
    with tempfile.TemporaryDirectory() as scratch:
        # The end tokens of a base are in its own files already.
        files = {**model.tokenizer_files, **own, hf_tokenizer.CONFIG_FILE: b"{}"}
        write_files(Path(scratch), files)
        return hf_tokenizer.read_tokenizer_folder(Path(scratch), vocab_size)


def _base_vocabulary(model: Source) -> dict[str, int]:
    tokenizer = Tokenizer.from_buffer(model.tokenizer_files[TOKENIZER_FILE])
    return tokenizer.get_vocab(with_added_tokens=True)


def _vocabulary(path: Path) -> dict[str, int]:
    try:
        return Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the Rust library raises plain Exception
        raise CheckpointError(f"{path}: not a readable tokenizer: {one_line(error)}") from error


def check_padding(folder: Path | None, source: str | Path, rows: int, base_rows: int) -> None:
    """Makes sure that the rows of a fine-tune beyond its base's are nobody's tokens, and says so.

    The token that pads batches counts as nobody's: no reply holds it.

    Args:
        folder: where the fine-tune's tokenizer is; None for a source that is no folder.
        source: of the fine-tune, for messages.
        rows: of its embedding.
        base_rows: of the base's, fewer.

    Raises:
        CheckpointError: there are such tokens, or no tokenizer that would say so.
    """
    resized = f"{source}: has an embedding of {rows} rows, the base's has {base_rows}"
    path = None if folder is None else folder / TOKENIZER_FILE
    cure = "import the base with --vocabulary-of this fine-tune, and it has them"
    if path is None or not path.is_file():
        raise CheckpointError(
            f"{resized}, and there is no {TOKENIZER_FILE} that tells whether tokens were added; "
            "put its tokenizer beside it"
        )
    assert folder is not None
    padding = _padding_token(folder)
    beyond = {t: i for t, i in _vocabulary(path).items() if i >= base_rows and t != padding}
    if beyond:
        tokens = sorted(beyond, key=beyond.__getitem__)
        shown = ", ".join(map(repr, tokens[:_SHOWN])) + (", ..." if len(tokens) > _SHOWN else "")
        raise CheckpointError(f"{resized}: tokens {shown} are not the base's; {cure}")
    logger.warning(
        "%s: its embedding has %d rows more than the base's, and no token of its own but for "
        "padding: they are left out",
        printable(str(source)),
        rows - base_rows,
    )


def _padding_token(folder: Path) -> str | None:
    for name in (hf_tokenizer.TOKENIZER_CONFIG_FILE, hf_tokenizer.SPECIAL_TOKENS_FILE):
        stated = read_json(folder / name).get("pad_token") if (folder / name).is_file() else None
        token = stated.get("content") if isinstance(stated, Mapping) else stated
        if isinstance(token, str):
            return token
    return None


def first_rows(tensor: LazyTensor, count: int) -> LazyTensor:
    """The first `count` rows of a tensor."""
    return LazyTensor((count, *tensor.shape[1:]), tensor.dtype, lambda: tensor.read()[:count])


def without_padding(source: Source, name: str | Path, base_rows: int) -> Source:
    """A fine-tune with as many rows as its base; see `check_padding`.

    Raises:
        CheckpointError: as there.
    """
    check_padding(source.folder, name, source.config.vocab_size, base_rows)
    tensors = {**source.tensors, EMBEDDING: first_rows(source.tensors[EMBEDDING], base_rows)}
    if (head := source.tensors.get(HEAD)) is not None:
        shape = (head.shape[0], base_rows)
        tensors[HEAD] = LazyTensor(shape, head.dtype, lambda: head.read()[:, :base_rows])
    return replace(
        source,
        config=replace(source.config, vocab_size=base_rows),
        tensors=tensors,
        hf_config=_stated(source.hf_config, vocab_size=base_rows),
    )
