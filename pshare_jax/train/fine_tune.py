"""A fine-tune that exists already: a run's teacher, or what its weights start from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pshare_jax.convert.files import one_line
from pshare_jax.convert.manifest import MANIFEST_FILE, Manifest, read_json, read_manifest
from pshare_jax.convert.orbax import open_weights
from pshare_jax.convert.peft import ADAPTER_CONFIG, read_lora
from pshare_jax.convert.sources import open_source
from pshare_jax.convert.tensors import LazyTensor
from pshare_jax.convert.vocabulary import without_padding
from pshare_jax.errors import CheckpointError, ConfigError
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.family import uses_long_factors
from pshare_jax.models.weights import Weights, weight_specs
from pshare_jax.sharding.rules import weight_shardings


@dataclass(frozen=True)
class LoraFactors:
    """A LoRA module's factors, read when asked; the update is `alpha / rank * a @ b`."""

    tensors: Mapping[str, LazyTensor]
    rank: int
    alpha: float
    targets: tuple[str, ...]


class FineTune:
    """A Hugging Face folder, PEFT's folder of a LoRA on the base, or a decode module of the base.

    Args:
        path: the folder, or whatever else `convert.sources` knows of full models.
        base: the base, whose vocabulary it must have.
        key: the configuration's key that names it, for messages.

    Attributes:
        config: its architecture.
        lora: its factors, if it is a LoRA on the base.
        cache_conditioned: whether it was trained on the base's KV.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: a checkpoint that is no fine-tune of this base.
    """

    def __init__(self, path: str, base: Manifest, key: str):
        self.path, self.key = path, key
        self._base = base
        self.config: ModelConfig = base.config
        self.lora: LoraFactors | None = None
        self.cache_conditioned = False
        self._tensors: Mapping[str, LazyTensor] = {}
        folder = Path(path).expanduser()
        if (folder / MANIFEST_FILE).is_file():
            self._open_module(folder)
        elif (folder / ADAPTER_CONFIG).is_file():
            found = read_lora(folder, base.config, open_weights(base))
            # An activated LoRA reads the base's KV up to its invocation.
            options = read_json(folder / ADAPTER_CONFIG)
            self.cache_conditioned = bool(options.get("alora_invocation_tokens"))
            self.lora = LoraFactors(found.tensors, found.rank, found.alpha, found.targets)
        else:
            source = open_source(
                folder if folder.exists() else path,
                tokenizer=False,
                long_context=uses_long_factors(base.config),
            )
            if source.config.vocab_size > base.config.vocab_size:
                source = without_padding(source, path, base.config.vocab_size)
            self.config, self._tensors = source.config, source.tensors
        if self.config.vocab_size != base.config.vocab_size:
            raise ConfigError(
                f"{key}: {path} has {self.config.vocab_size} tokens, the base "
                f"{base.config.vocab_size}; it must be a fine-tune of the base"
            )

    def _open_module(self, folder: Path) -> None:
        manifest = read_manifest(folder)
        certificate = manifest.certificate
        if certificate is None:
            raise ConfigError(f"{self.key}: {self.path} is no decode module; name a fine-tune")
        if self._base.current(certificate.prefill_fingerprint) != self._base.fingerprint:
            raise ConfigError(f"{self.key}: {self.path} was made for another base")
        self.config = manifest.config
        self.cache_conditioned = certificate.cache_conditioned
        tensors = open_weights(manifest)
        if certificate.kind == "full":
            self._tensors = tensors
            return
        assert certificate.lora_rank is not None
        assert certificate.lora_alpha is not None
        assert certificate.lora_targets is not None
        self.lora = LoraFactors(
            tensors, certificate.lora_rank, certificate.lora_alpha, certificate.lora_targets
        )

    def check_teaches(self) -> None:
        """Checks that it reads prompts with KV of its own, as a teacher does.

        Raises:
            ConfigError: it was trained on the base's KV.
        """
        if self.cache_conditioned:
            raise ConfigError(
                f"{self.key}: {self.path} was trained on the base's KV, and is not the same model "
                "with KV of its own, which a teacher reads; name an ordinary fine-tune, or start "
                "from this module with init"
            )

    def load(self, mesh: Mesh, dtype: Any) -> Weights:
        """All its weights in `dtype` on `mesh`, read one at a time; a LoRA's are the base's with
        its update added in float32."""
        shardings = weight_shardings(mesh, weight_specs(self.config))
        tensors = self._tensors if self.lora is None else open_weights(self._base)
        return {
            name: place(self._adapted(name, np.asarray(t.read())).astype(dtype), shardings[name])
            for name, t in tensors.items()
        }

    def _adapted(self, name: str, weight: np.ndarray) -> np.ndarray:
        if self.lora is None:
            return weight
        path = name.removesuffix(".kernel")
        a, b = (self.lora.tensors.get(f"{path}.lora_{factor}") for factor in "ab")
        if path == name or a is None or b is None:
            return weight
        factors = (np.asarray(factor.read(), np.float32) for factor in (a, b))
        update = np.tensordot(*factors, axes=1)
        return weight.astype(np.float32) + self.lora.alpha / self.lora.rank * update


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """`array` on the devices of `sharding`."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def content_sha256(path: str) -> str:
    """Hash (hex) of the names and bytes of a folder's files; of `path` alone where it is no folder
    or file here, but a version in a registry.

    Raises:
        CheckpointError: a file cannot be read.
    """
    root = Path(path).expanduser()
    if not root.exists():
        return hashlib.sha256(path.encode()).hexdigest()
    files = [root] if root.is_file() else sorted(f for f in root.rglob("*") if f.is_file())
    digest = hashlib.sha256()
    for file in files:
        name = str(file.relative_to(root))
        if name.startswith("."):
            continue
        try:
            with file.open("rb") as opened:
                content = hashlib.file_digest(opened, "sha256").hexdigest()
            digest.update(f"{name}\0{content}\0".encode())
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {one_line(error)}") from error
    return digest.hexdigest()
