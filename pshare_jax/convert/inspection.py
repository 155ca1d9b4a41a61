"""`inspect`: what a checkpoint is, and whether its bytes are still the ones that were written."""

from __future__ import annotations

import json
import math
from pathlib import Path

from pshare_jax.convert.eight_bits import KEPT
from pshare_jax.convert.manifest import TENSORS_FILE, Manifest, read_manifest
from pshare_jax.convert.orbax import open_stored, read_tokenizer_files
from pshare_jax.convert.progress import progress_bar
from pshare_jax.convert.seals import write_seals
from pshare_jax.errors import CheckpointError
from pshare_jax.models.split import tensor_hash


def describe(manifest: Manifest) -> list[tuple[str, str]]:
    """Label and value of each thing worth knowing about a checkpoint."""
    config = manifest.config
    parameters = sum(math.prod(entry.shape) for entry in manifest.tensors.values())
    rows = [
        ("folder", str(manifest.folder)),
        ("kind", manifest.kind),
        (
            "architecture",
            f"{config.architecture}: {config.num_layers} layers, hidden {config.hidden_size}, "
            f"MLP {config.intermediate_size}, {config.num_heads} query and {config.num_kv_heads} "
            f"KV heads of {config.head_dim}, vocabulary {config.vocab_size}",
        ),
        ("parameters", f"{parameters:,}"),
        ("bytes", f"{manifest.nbytes:,} in {len(manifest.tensors)} tensors"),
        ("dtype", manifest.dtype),
        ("fingerprint", manifest.fingerprint),
    ]
    if manifest.weights != "plain":
        rows.insert(-1, ("weights", f"the source's {KEPT[manifest.weights]}"))
    if (certificate := manifest.certificate) is not None:
        rows += [
            ("made for base", certificate.prefill_fingerprint),
            ("decode kind", certificate.kind),
            ("tail", json.dumps(certificate.tail.to_json())),
            ("trained on KV", "yes" if certificate.cache_conditioned else "no"),
        ]
        if certificate.kind == "lora":
            rows += [
                ("LoRA", f"rank {certificate.lora_rank}, alpha {certificate.lora_alpha:g}"),
                ("LoRA targets", ", ".join(certificate.lora_targets or ())),
            ]
    return rows


def table(rows: list[tuple[str, str]]) -> str:
    """`rows` as aligned text."""
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def check_hashes(folder: str | Path | Manifest) -> Manifest:
    """Reads every tensor and compares its hash, then the tokenizer's.

    The fingerprint, which is made of those hashes, is compared wherever a manifest is read.

    Raises:
        CheckpointError: names the first tensor or file that is not what was written.
    """
    manifest = folder if isinstance(folder, Manifest) else read_manifest(folder)
    with progress_bar("check", manifest.nbytes) as report:
        for name, tensor in open_stored(manifest).items():
            if tensor_hash(tensor.read()) != manifest.tensors[name].sha256:
                raise CheckpointError(
                    f"{manifest.folder}: tensor {name} is not the one that {TENSORS_FILE} records"
                )
            report(name, tensor.nbytes)
    if manifest.kind == "prefill":
        read_tokenizer_files(manifest)
    return manifest


def accept(folder: str | Path) -> Manifest:
    """Records a checkpoint's small files as they are now, after `check_hashes`.

    For templates, end tokens and certificates that were changed on purpose, and for checkpoints
    that were made before there were such records.

    Raises:
        CheckpointError: as `check_hashes`: what the fingerprint covers cannot be accepted.
    """
    manifest = check_hashes(folder)
    write_seals(manifest.folder, manifest)
    return manifest
