"""What is served: the base and the models, as checkpoints name them and as engines know them.

Only manifests are read here: a frontend has no device, and needs no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pshare_jax.config import KvDtype, ModelEntry, Reasoning, ServeConfig, Sharing
from pshare_jax.convert.manifest import TOKENIZER_FOLDER
from pshare_jax.convert.seals import open_checkpoint
from pshare_jax.core.models import ModelKind, ModelSpec
from pshare_jax.core.split_rule import LAST_TOKEN, SplitRule
from pshare_jax.engine.weight_format import LoadTensors, loader_of, served_model
from pshare_jax.errors import ConfigError
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.quantise import kv_name
from pshare_jax.models.split import Certificate, check_certificate, isolated_namespace

BASE = "base"
"""Name of the base's weights, and of the group of models that decode with them: the base itself
(adapter -1) and all LoRA modules."""


@dataclass(frozen=True)
class BaseSource:
    """The prefill checkpoint: architecture, fingerprint, and how to load its weights.

    `load_plain` loads them in plain form, if that is another than the one that `config` has.
    """

    config: ModelConfig
    fingerprint: str
    load: LoadTensors
    former_fingerprints: tuple[str, ...] = ()
    load_plain: LoadTensors | None = None
    kv_dtype: KvDtype = "auto"

    @property
    def kv_name(self) -> str:
        """Names the KV that it writes as it is loaded."""
        name = kv_name(self.fingerprint, self.config.weight_format)
        return name if self.kv_dtype == "auto" else f"{name}/kv-{self.kv_dtype}"


@dataclass(frozen=True)
class ModelSource:
    """One served model: its certificate (None for the base's own weights) and how to load it.

    `tokenizer_folder` has its own chat template and end tokens, where it has some; `tool_parser`
    and `reasoning` are those of `ModelEntry`.
    """

    name: str
    kind: ModelKind
    sharing: Sharing
    load: LoadTensors
    certificate: Certificate | None = None
    decode_engines: tuple[int, ...] = ()
    tokenizer_folder: Path | None = None
    tool_parser: str = "auto"
    reasoning: Reasoning = "auto"

    @property
    def split_rule(self) -> SplitRule:
        """Which of a prompt's tokens its decode module reads itself."""
        return self.certificate.tail if self.certificate else LAST_TOKEN


def checkpoint_sources(config: ServeConfig, dtype: Any) -> tuple[BaseSource, list[ModelSource]]:
    """The sources that a serving configuration names; reads manifests only, no tensors.

    Raises:
        ConfigError: a checkpoint of the wrong kind.
        CheckpointError: a checkpoint that cannot be read.
        CertificateError: a decode module that was made for another base, or that is to share KV
            it was not trained on.
    """
    manifest = open_checkpoint(config.base)
    if manifest.kind != "prefill":
        raise ConfigError(f"base: {config.base} is a decode module; name a prefill checkpoint")

    model = served_model(config, manifest)
    load, plain = loader_of(manifest, dtype, model), loader_of(manifest, dtype, manifest.config)
    base = BaseSource(model, manifest.fingerprint, load, manifest.former, plain, config.kv_dtype)
    return base, [model_source(entry, base, dtype) for entry in config.models]


def model_source(
    entry: ModelEntry, base: BaseSource, dtype: Any, *, gentle: bool = False
) -> ModelSource:
    """The source of one served model; reads its manifest only. `gentle` is that of `load_weights`.

    Raises:
        ConfigError, CheckpointError, CertificateError: as `checkpoint_sources`.
    """
    engines = tuple(entry.decode_engines)
    if entry.checkpoint == "identity":
        return ModelSource(
            entry.name,
            "identity",
            entry.sharing,
            base.load,
            decode_engines=engines,
            tool_parser=entry.tool_parser,
            reasoning=entry.reasoning,
        )
    manifest = open_checkpoint(entry.checkpoint, gentle=gentle)
    if manifest.certificate is None:
        raise ConfigError(
            f"models.{entry.name}.checkpoint: {entry.checkpoint} is a prefill checkpoint; name a "
            "decode module, or `identity` for the base's own weights"
        )
    check_certificate(
        manifest.certificate, base.fingerprint, entry.sharing, entry.name, base.former_fingerprints
    )
    return ModelSource(
        entry.name,
        manifest.certificate.kind,
        entry.sharing,
        loader_of(manifest, dtype, base.config, gentle=gentle),
        manifest.certificate,
        engines,
        own if (own := manifest.folder / TOKENIZER_FOLDER).is_dir() else None,
        entry.tool_parser,
        entry.reasoning,
    )


def model_specs(
    base: BaseSource, sources: list[ModelSource], num_decode_engines: int
) -> dict[str, ModelSpec]:
    """The engines' view of each model, by name.

    Raises:
        ConfigError: no models, a name that is used twice, or a decode engine that does not exist.
    """
    if not sources:
        raise ConfigError("models: at least one model must be served")
    table: dict[str, ModelSpec] = {}
    num_lora = 0
    for source in sources:
        if not source.name or source.name in table:
            raise ConfigError(f"models: the name {source.name!r} is empty or used twice")
        engines = source.decode_engines or tuple(range(num_decode_engines))
        if wrong := [e for e in engines if not 0 <= e < num_decode_engines]:
            raise ConfigError(
                f"models.{source.name}.decode_engines: {wrong[0]} does not exist; there are "
                f"{num_decode_engines}, counted from 0"
            )
        is_lora = source.kind == "lora"
        table[source.name] = ModelSpec(
            name=source.name,
            kind=source.kind,
            sharing=source.sharing,
            split_rule=source.split_rule,
            prefill_weights=prefill_weights(source),
            namespace=_namespace(source, base.kv_name),
            group=own_weights(source) if source.kind == "full" else BASE,
            adapter=num_lora if is_lora else -1,
            decode_workers=tuple(f"decode{e}" for e in engines),
        )
        num_lora += is_lora
    return table


def loaded_spec(
    source: ModelSource, base: BaseSource, id: str, group: str, adapter: int, engines: int
) -> ModelSpec:
    """The engines' view of a module that is loaded while they run, on all of them.

    Args:
        source: the module; it shares the base's KV.
        base: the prefill module.
        id: see `ModelSpec.name`.
        group: of its weights, `BASE` for a LoRA module.
        adapter: index of a LoRA module; -1 for a full one.
        engines: number of decode engines.
    """
    return ModelSpec(
        name=id,
        kind=source.kind,
        sharing=source.sharing,
        split_rule=source.split_rule,
        prefill_weights=BASE,
        namespace=base.kv_name,
        group=group,
        adapter=adapter,
        decode_workers=tuple(f"decode{e}" for e in range(engines)),
    )


def _namespace(source: ModelSource, fingerprint: str) -> str:
    """Names the KV that a model reads: by the weights that write it, where they are its own.

    A base that is served isolated has no weights of its own. It has been asked not to share, so
    its name stands for it.
    """
    if source.sharing == "shared":
        return fingerprint
    if source.certificate is None:
        return f"isolated/{fingerprint}/{source.name}"
    return isolated_namespace(fingerprint, source.certificate)


def own_weights(source: ModelSource) -> str:
    """Name of a model's own weights; that of no model is `BASE`, whatever the models' names."""
    return f"{source.kind}/{source.name}"


def prefill_weights(source: ModelSource) -> str:
    """Name of the weights that prefill for a model: an isolated base is the base all the same."""
    shared = source.sharing == "shared" or source.kind == "identity"
    return BASE if shared else own_weights(source)
