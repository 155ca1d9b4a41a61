"""A module is evaluated beside its own base only."""

from __future__ import annotations

import pytest

from pshare_jax.convert.orbax import write_decode, write_prefill
from pshare_jax.errors import CertificateError
from pshare_jax.models.decoder import init_weights
from pshare_jax.study.evaluate import Evaluator
from pshare_jax.train.config import KVCacheConfig
from tests.train.helpers import MODEL, write_base


def test_a_module_of_another_base_is_refused(tmp_path):
    base = write_base(tmp_path)
    files = {path.name: path.read_bytes() for path in (base / "tokenizer").iterdir()}
    other = write_prefill(tmp_path / "other", MODEL, init_weights(MODEL, 1), files)
    module = tmp_path / "module"
    write_decode(module, other, init_weights(MODEL, 2), cache_conditioned=True)
    Evaluator(str(tmp_path / "other"), module, 2, KVCacheConfig())
    with pytest.raises(CertificateError, match="module"):
        Evaluator(str(base), module, 2, KVCacheConfig())
