"""From checkpoints to what the engines are built of: weights on each mesh, and a model table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, Sharding

from pshare_jax.config import ModelEntry, ServeConfig, Sharing
from pshare_jax.convert.manifest import Manifest, read_manifest
from pshare_jax.convert.orbax import load_weights
from pshare_jax.core.messages import ModelKind
from pshare_jax.core.models import ModelSpec
from pshare_jax.core.split_rule import LAST_TOKEN, SplitRule
from pshare_jax.errors import CheckpointError, ConfigError
from pshare_jax.kernels.backends import on_mesh
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.lora import LoraModule, merge, stack_adapters
from pshare_jax.models.packed import is_packed, pack_adapters, pack_weights
from pshare_jax.models.split import Certificate, check_certificate, isolated_namespace
from pshare_jax.models.weights import Weights, lora_specs, weight_specs
from pshare_jax.runtime.executor import GroupWeights
from pshare_jax.sharding.rules import replicated, weight_shardings

LoadTensors = Callable[[Mapping[str, Sharding]], Weights]
"""Loads a checkpoint's tensors onto the given shardings."""

LORA_GROUP = "lora"
BASE = "base"


@dataclass(frozen=True)
class BaseSource:
    """The prefill checkpoint: architecture, fingerprint, and how to load its weights."""

    config: ModelConfig
    fingerprint: str
    load: LoadTensors
    former_fingerprints: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelSource:
    """One served model: its certificate (None for the base's own weights) and how to load it."""

    name: str
    kind: ModelKind
    sharing: Sharing
    load: LoadTensors
    certificate: Certificate | None = None
    decode_engines: tuple[int, ...] = ()

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
    manifest = read_manifest(config.base)
    if manifest.kind != "prefill":
        raise ConfigError(f"base: {config.base} is a decode module; name a prefill checkpoint")

    def loader(source: Manifest) -> LoadTensors:
        return lambda shardings: load_weights(source, dtype=dtype, shardings=shardings)

    base = BaseSource(manifest.config, manifest.fingerprint, loader(manifest), manifest.former)
    return base, [_model_source(entry, base, loader) for entry in config.models]


def _model_source(
    entry: ModelEntry, base: BaseSource, loader: Callable[[Manifest], LoadTensors]
) -> ModelSource:
    engines = tuple(entry.decode_engines)
    if entry.checkpoint == "identity":
        return ModelSource(entry.name, "identity", entry.sharing, base.load, None, engines)
    manifest = read_manifest(entry.checkpoint)
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
        loader(manifest),
        manifest.certificate,
        engines,
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
        isolated = source.sharing == "isolated"
        is_lora = source.kind == "lora"
        table[source.name] = ModelSpec(
            name=source.name,
            kind=source.kind,
            sharing=source.sharing,
            split_rule=source.split_rule,
            prefill_weights=source.name if isolated else BASE,
            namespace=_namespace(source, base.fingerprint),
            group=LORA_GROUP if is_lora else f"full/{source.name}",
            adapter=num_lora if is_lora else -1,
            decode_workers=tuple(f"decode{e}" for e in engines),
        )
        num_lora += is_lora
    return table


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


class WeightLoader:
    """Loads weights onto meshes.

    Args:
        base: the prefill module.
        sources: the served models.
        backend: the kernel backend; see `models.packed.is_packed`.
    """

    def __init__(self, base: BaseSource, sources: list[ModelSource], backend: str):
        self._base = base
        self._sources = sources
        self._backend = backend

    def prefill(self, mesh: Mesh) -> dict[str, Weights]:
        """What one prefill mesh needs: the base's weights, and those of each isolated model."""
        base = self._full(self._base.load, mesh)
        weights = {BASE: base}
        for source in self._sources:
            if source.sharing == "isolated":
                if source.kind == "lora":
                    merged = merge(base, self._lora(source, mesh))
                    weights[source.name] = jax.device_put(merged, self._shardings(mesh))
                else:
                    weights[source.name] = self._full(source.load, mesh)
        return {name: self._packed(module, mesh) for name, module in weights.items()}

    def decode(
        self, mesh: Mesh, engine: int, table: Mapping[str, ModelSpec]
    ) -> dict[str, GroupWeights]:
        """What one decode mesh needs: each full module's weights; the base's and the stacked
        adapters for the LoRA modules."""
        hosted = [s for s in self._sources if f"decode{engine}" in table[s.name].decode_workers]
        groups = {
            table[source.name].group: GroupWeights(
                self._packed(self._full(source.load, mesh), mesh)
            )
            for source in hosted
            if source.kind != "lora"
        }
        if any(source.kind == "lora" for source in hosted):
            # All LoRA modules, hosted or not, so that a module's index is the same everywhere.
            modules = [self._lora(s, mesh) for s in self._sources if s.kind == "lora"]
            stacked = stack_adapters(modules)
            if is_packed(on_mesh(self._backend, mesh.size)):
                stacked = pack_adapters(self._base.config, stacked)
            stacked = jax.device_put(stacked, replicated(mesh))
            base = self._packed(self._full(self._base.load, mesh), mesh)
            groups[LORA_GROUP] = GroupWeights(base, stacked)
        return groups

    def _packed(self, weights: Weights, mesh: Mesh) -> Weights:
        """`weights` as the steps of `mesh` read them."""
        if not is_packed(on_mesh(self._backend, mesh.size)):
            return weights
        return pack_weights(self._base.config, weights)

    def _shardings(self, mesh: Mesh) -> dict[str, Any]:
        return weight_shardings(mesh, weight_specs(self._base.config))

    def _full(self, load: LoadTensors, mesh: Mesh) -> Weights:
        return load(self._shardings(mesh))

    def _lora(self, source: ModelSource, mesh: Mesh) -> LoraModule:
        certificate = source.certificate
        if certificate is None or certificate.lora_rank is None or not certificate.lora_targets:
            raise CheckpointError(f"{source.name}: a LoRA module without a LoRA certificate")
        names = lora_specs(self._base.config, certificate.lora_rank, certificate.lora_targets)
        return certificate.lora_module(source.load(dict.fromkeys(names, replicated(mesh))))
