"""What an exported decode module says of itself, so that it can come back as what it was.

Hugging Face's and PEFT's folders have no place for the base that a module was trained on, its tail,
or whether it reads the base's KV; a small file beside the weights has.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pshare_jax.convert.manifest import Manifest
from pshare_jax.core.split_rule import SplitRule, parse_rule
from pshare_jax.errors import CertificateError
from pshare_jax.models.split import Certificate

STATEMENT_FILE = "pshare_certificate.json"


@dataclass(frozen=True)
class Statement:
    """What of a certificate does not depend on the format of the weights; see `Certificate`."""

    prefill_fingerprint: str
    tail: SplitRule
    cache_conditioned: bool


def write_statement(folder: Path, certificate: Certificate) -> None:
    """Writes what `certificate` says into `folder`."""
    values = certificate.to_json()
    fields = {name: values[name] for name in Statement.__dataclass_fields__}
    (folder / STATEMENT_FILE).write_text(json.dumps(fields, indent=2) + "\n")


def read_statement(source: str | Path | None, base: Manifest) -> Statement | None:
    """What the folder `source` says of itself; None when it says nothing, or is no folder.

    Raises:
        CertificateError: the file cannot be understood, or names another base than `base`.
    """
    path = Path(source or "") / STATEMENT_FILE
    if source is None or not path.is_file():
        return None
    try:
        fields = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        tail = parse_rule(fields.get("tail"))
        statement = msgspec.convert({**fields, "tail": tail}, Statement)
    except (ValueError, OSError, RecursionError) as error:  # msgspec's are ValueErrors
        raise CertificateError(f"{path}: cannot be read: {error}") from error
    if base.current(statement.prefill_fingerprint) != base.fingerprint:
        raise CertificateError(
            f"{source}: made for the base {statement.prefill_fingerprint[:12]}, but {base.folder} "
            f"is {base.fingerprint[:12]}; convert it against its own base"
        )
    return statement
