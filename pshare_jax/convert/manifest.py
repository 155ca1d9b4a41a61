"""`pshare.json` and `tensors.json`: what a checkpoint folder says about itself.

FOLDER/pshare.json   kind, architecture, dtype, fingerprint, certificate
FOLDER/tensors.json  shape, dtype and SHA-256 of each tensor
FOLDER/seals.json    hashes of the small files and of the tensors' checksums, see `seals`
FOLDER/weights/      the tensors, an orbax checkpoint of one flat dict
FOLDER/tokenizer/    tokenizer.json and its companions (prefill checkpoints only)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pshare_jax.convert.eight_bits import KEPT
from pshare_jax.convert.files import one_line
from pshare_jax.convert.tensors import DTYPES, STORED_DTYPES
from pshare_jax.errors import CertificateError, CheckpointError
from pshare_jax.models.config import ModelConfig, WeightFormat, config_from_json, config_to_json
from pshare_jax.models.fingerprint import former_fingerprints, prefill_fingerprint
from pshare_jax.models.split import Certificate
from pshare_jax.models.weights import WeightSpec, lora_specs, weight_specs

FORMAT = 1
MANIFEST_FILE = "pshare.json"
TENSORS_FILE = "tensors.json"
WEIGHTS_FOLDER = "weights"
TOKENIZER_FOLDER = "tokenizer"
TOKENIZER_FILE = "tokenizer.json"
MAX_JSON_BYTES = 1 << 26
"""Of configurations and tables of tensors; of the largest models they have a few megabytes."""

CheckpointKind = Literal["prefill", "decode"]


@dataclass(frozen=True)
class TensorEntry:
    """Shape, dtype name and content hash (`split.tensor_hash`) of one stored tensor."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * STORED_DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is.

    Args:
        folder: where it lies.
        kind: `prefill` or `decode`.
        config: the architecture; a decode module's is its base's. Its weights are plain ones,
            whatever is stored.
        dtype: dtype name of all tensors, but for those of 8 bits and their scales.
        fingerprint: hash of weights, architecture and tokenizer. For a prefill checkpoint it is the
            prefill fingerprint; for a decode module its certificate's `weights_fingerprint`. Always
            of the current version, whatever the file states.
        tokenizer_hash: SHA-256 (hex) of `tokenizer.json`; a decode module has its base's.
        certificate: a decode module's; None for a prefill checkpoint.
        tensors: the stored tensors by name.
        source_config: the Hugging Face `config.json` that it was imported from, if any: an export
            gives back what `ModelConfig` does not carry.
        former: what earlier versions called it; the file may state one of these.
        weights: the form of what is stored: `plain`, or one of `eight_bits.KEPT`.
    """

    folder: Path
    kind: CheckpointKind
    config: ModelConfig
    dtype: str
    fingerprint: str
    tokenizer_hash: str
    certificate: Certificate | None
    tensors: Mapping[str, TensorEntry]
    source_config: Mapping[str, Any] | None = None
    former: tuple[str, ...] = ()
    weights: WeightFormat = "plain"

    def current(self, fingerprint: str) -> str:
        """The current name for a former one of this checkpoint; any other name as it is."""
        return self.fingerprint if fingerprint in self.former else fingerprint

    @property
    def specs(self) -> dict[str, WeightSpec]:
        """Names, shapes and axes of the tensors that such a checkpoint must hold."""
        return stored_specs(self.config, self.certificate, self.weights)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())


def stored_specs(
    config: ModelConfig, certificate: Certificate | None, weights: WeightFormat = "plain"
) -> dict[str, WeightSpec]:
    """The tensors that a checkpoint holds: a full module's, or a LoRA module's factors only."""
    if certificate is None or certificate.kind == "full":
        return weight_specs(config.with_weights(weights))
    assert certificate.lora_rank is not None
    assert certificate.lora_targets is not None
    return lora_specs(config, certificate.lora_rank, certificate.lora_targets)


def tokenizer_hash(files: Mapping[str, bytes]) -> str:
    """SHA-256 (hex) of `tokenizer.json`, which alone decides the ids that a text becomes.

    The chat template and the stop tokens may change without making another prefill module.
    """
    return hashlib.sha256(files[TOKENIZER_FILE]).hexdigest()


def fingerprints(
    config: ModelConfig,
    entries: Mapping[str, TensorEntry],
    tokenizer_hash: str,
    certificate: Certificate | None,
) -> tuple[str, tuple[str, ...]]:
    """The fingerprint of a checkpoint's tensors, and what earlier versions called them.

    A base and a full decode module that is a copy of it have the same.

    Args:
        config: the architecture.
        entries: the tensors, with their hashes.
        tokenizer_hash: of the base's `tokenizer.json`.
        certificate: a decode module's. LoRA factors depend on their rank and alpha besides
            themselves, and on no tokenizer.
    """
    hashes = {name: entry.sha256 for name, entry in entries.items()}
    if certificate is None or certificate.kind == "full":
        return (
            prefill_fingerprint(config, hashes, tokenizer_hash),
            former_fingerprints(config, hashes, tokenizer_hash),
        )
    rank, alpha = certificate.lora_rank, certificate.lora_alpha
    assert alpha is not None
    context = f"{certificate.prefill_fingerprint} {rank}"
    former = (
        name
        # Alpha was written as it had been given, an integer or not.
        for written in dict.fromkeys((str(alpha), f"{alpha:g}"))
        for name in former_fingerprints(config, hashes, f"{context} {written}")
    )
    return prefill_fingerprint(config, hashes, f"lora {rank} {float(alpha)}"), tuple(former)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes both files of `manifest` into `folder`."""
    certificate = manifest.certificate and manifest.certificate.to_json()
    about = {
        "format": FORMAT,
        "kind": manifest.kind,
        "config": config_to_json(manifest.config),
        "dtype": manifest.dtype,
        "fingerprint": manifest.fingerprint,
        "tokenizer_hash": manifest.tokenizer_hash,
        "certificate": certificate,
        "source_config": manifest.source_config,
    }
    if manifest.weights != "plain":
        about["weights"] = manifest.weights
    tensors = {name: dataclasses.asdict(entry) for name, entry in manifest.tensors.items()}
    (folder / MANIFEST_FILE).write_text(json.dumps(about, indent=2) + "\n")
    lines = (f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in tensors.items())
    (folder / TENSORS_FILE).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Raises:
        CheckpointError: no such file, not JSON, not an object, nested too deeply or very large.
    """
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: has {size} bytes, but may have {MAX_JSON_BYTES}")
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {one_line(error)}") from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: cannot be read: nested too deeply") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return value


def read_manifest(folder: str | Path) -> Manifest:
    """Reads and checks what the checkpoint in `folder` says about itself; no tensor is read.

    A fingerprint of an earlier version is recognised: the manifest has the current one, the file
    stays as it is.

    Raises:
        CheckpointError: no checkpoint, a malformed file, another format, tensors that are missing,
            unexpected or misshapen for the architecture (names the first), or a fingerprint that
            is not theirs.
    """
    folder = Path(folder).expanduser()
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: is not a checkpoint (no {MANIFEST_FILE}); "
            "make one with `python -m pshare_jax.convert import`"
        )
    about = read_json(path)
    if about.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format is {about.get('format')!r}; only {FORMAT} is known")
    tensors = read_json(folder / TENSORS_FILE)
    try:
        certificate = about["certificate"]
        manifest = Manifest(
            folder=folder,
            kind=about["kind"],
            config=config_from_json(about["config"]),
            dtype=about["dtype"],
            fingerprint=about["fingerprint"],
            tokenizer_hash=about["tokenizer_hash"],
            certificate=None if certificate is None else Certificate.from_json(certificate),
            tensors={
                name: TensorEntry(tuple(entry["shape"]), entry["dtype"], entry["sha256"])
                for name, entry in tensors.items()
            },
            source_config=about["source_config"],
            weights=about.get("weights", "plain"),
        )
    except CertificateError as error:
        raise CertificateError(f"{path}: {error}") from error
    except KeyError as error:
        raise CheckpointError(f"{path}: {error.args[0]} is missing") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: malformed: {one_line(error)}") from error
    if (manifest.kind, manifest.certificate is None) not in (("prefill", True), ("decode", False)):
        raise CheckpointError(f"{path}: kind {manifest.kind!r} and the certificate disagree")
    if manifest.weights not in ("plain", *KEPT):
        raise CheckpointError(f"{path}: weights of the form {manifest.weights!r} are not known")
    _check_tensors(manifest)
    return _with_current_fingerprint(manifest)


def _check_tensors(manifest: Manifest) -> None:
    path = manifest.folder / TENSORS_FILE
    specs = manifest.specs
    for name, spec in specs.items():
        entry = manifest.tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{path}: tensor {name} is missing")
        if entry.shape != spec.shape:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {list(entry.shape)}, "
                f"but its config needs {list(spec.shape)}"
            )
        if entry.dtype != (spec.dtype or manifest.dtype) or manifest.dtype not in DTYPES:
            raise CheckpointError(f"{path}: tensor {name} has an unsupported dtype {entry.dtype!r}")
    if unknown := sorted(set(manifest.tensors) - set(specs)):
        raise CheckpointError(f"{path}: tensor {unknown[0]} is unexpected")


def _with_current_fingerprint(manifest: Manifest) -> Manifest:
    """`manifest`, of which `fingerprint` is still what its file states."""
    certificate = manifest.certificate
    current, former = fingerprints(
        manifest.config, manifest.tensors, manifest.tokenizer_hash, certificate
    )
    stated = [manifest.fingerprint]
    if certificate is not None:
        stated.append(certificate.weights_fingerprint)
        certificate = replace(certificate, weights_fingerprint=current)
    if not set(stated) <= {current, *former}:
        raise CheckpointError(
            f"{manifest.folder / MANIFEST_FILE}: the fingerprint is not the one of its tensors; "
            "convert the checkpoint again"
        )
    return replace(manifest, fingerprint=current, former=former, certificate=certificate)
