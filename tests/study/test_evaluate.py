"""A module is evaluated beside its own base only."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from pshare_jax.convert.orbax import write_decode, write_prefill
from pshare_jax.core.split_rule import LAST_TOKEN, Invocation, LastTokens
from pshare_jax.errors import CertificateError, ConfigError
from pshare_jax.evals.items import Item
from pshare_jax.models.decoder import init_weights
from pshare_jax.models.weights import lora_specs
from pshare_jax.study import served as served_module
from pshare_jax.study.evaluate import Evaluator, cover_share
from pshare_jax.study.recompute import recomputed_kv
from pshare_jax.train.config import KVCacheConfig
from pshare_jax.train.loss import Recipe, base_kv
from tests.train.helpers import MODEL, write_base


def test_a_module_of_another_base_is_refused(tmp_path):
    base = write_base(tmp_path)
    files = _tokenizer(tmp_path)
    other = write_prefill(tmp_path / "other", MODEL, init_weights(MODEL, 1), files)
    module = tmp_path / "module"
    write_decode(module, other, init_weights(MODEL, 2), cache_conditioned=True)
    Evaluator(str(tmp_path / "other"), module, 2, KVCacheConfig())
    with pytest.raises(CertificateError, match="module"):
        Evaluator(str(base), module, 2, KVCacheConfig())


def test_activated_lora_is_evaluated_from_its_invocation_on(tmp_path):
    """Though it can be served shared only, and what is naive is evaluated too."""
    base = write_prefill(tmp_path / "base", MODEL, init_weights(MODEL, 0), _tokenizer(tmp_path))
    factors = {
        name: np.zeros(spec.shape, np.float32)
        for name, spec in lora_specs(MODEL, 2, ("q",)).items()
    }
    module = tmp_path / "module"
    write_decode(
        module,
        base,
        factors,
        tail=Invocation((5, 6)),
        cache_conditioned=True,
        lora_rank=2,
        lora_alpha=2.0,
        lora_targets=("q",),
    )
    evaluator = Evaluator(str(base.folder), module, 2, KVCacheConfig())
    assert evaluator.cover_by({"invocation": [5, 6]})([1, 5, 6, 2]) == 1
    plain = Evaluator(str(base.folder), None, 2, KVCacheConfig())
    rule = cover_share(1.0)
    answers = (e.answer(items(3), rule, 2, lambda count: None) for e in (evaluator, plain))
    assert len({tuple(answer.texts) for answer in answers}) == 1  # factors of zero change nothing


@pytest.mark.parametrize("tail", [8, None], ids=["shared", "isolated"])
def test_the_servers_engine_answers_as_the_trainers_decoding(tmp_path, monkeypatch, tail):
    configs = []
    monkeypatch.setattr(served_module.Engine, "from_config", keeping(configs))
    base = write_prefill(tmp_path / "base", MODEL, init_weights(MODEL, 0), _tokenizer(tmp_path))
    module = tmp_path / "module"
    rule = LAST_TOKEN if tail is None else LastTokens(tail)
    own = init_weights(MODEL, 1)
    write_decode(module, base, own, tail=rule, cache_conditioned=tail is not None)
    evaluator = Evaluator(str(base.folder), module, 2, KVCacheConfig())
    cover = cover_share(0.0) if tail is None else evaluator.cover_by(tail)
    expected = evaluator.answer(items(3), cover, 6, lambda count: None)
    done: list[int] = []
    served = evaluator.answer_as_served(items(3), tail, 6, "float32", done.append)
    assert served == expected
    assert len(set(served.texts)) > 1
    assert configs[0].connector == "same-mesh"  # there is one device where a study runs
    assert sum(done) == 3


def keeping(configs: list):
    """`Engine.from_config`, which keeps what it is given."""
    real = served_module.Engine.from_config

    def from_config(config):
        configs.append(config)
        return real(config)

    return from_config


def _tokenizer(folder: Path) -> dict[str, bytes]:
    base = write_base(folder / "with-a-tokenizer")
    return {path.name: path.read_bytes() for path in (base / "tokenizer").iterdir()}


def items(count: int) -> list[Item]:
    words = ("the quick", "brown fox", "lazy dog")
    return [
        Item(str(i), "exact", [{"role": "user", "content": words[i % 3]}], [], "fox")
        for i in range(count)
    ]


def test_what_is_saved_is_counted_in_tokens_and_layers(tmp_path):
    base = write_base(tmp_path)
    evaluator = Evaluator(str(base), None, 2, KVCacheConfig())

    def answer(cover, layers=None):
        return evaluator.answer(items(3), cover, 2, lambda count: None, layers)

    isolated, shared = answer(cover_share(0.0)), answer(cover_share(1.0))
    assert isolated.saved == 0
    assert shared.saved == pytest.approx(1 - 3 / shared.prompt_tokens)
    assert evaluator.cover_by("last-message")([*range(5)]) == 4  # no message: a plain text
    # With the base's own weights it does not matter which layers are computed anew.
    anew = answer(cover_share(1.0), (1, 2))
    assert anew.texts == shared.texts == isolated.texts
    assert anew.saved == pytest.approx(shared.saved * (1 - 1 / MODEL.num_layers))
    with pytest.raises(ConfigError, match="recompute names layer 99"):
        answer(cover_share(1.0), (0, 99))


def test_kv_that_is_computed_anew_is_the_fine_tunes(tmp_path):
    base, own = init_weights(MODEL, 0), init_weights(MODEL, 1)
    prompt = np.random.default_rng(0).integers(0, 400, (2, 9), dtype=np.int32)
    recipe = Recipe(MODEL, "float32")
    plain = jax.jit(base_kv, static_argnums=0)
    theirs = np.asarray(plain(recipe, base, prompt))
    mixed = np.asarray(recomputed_kv(recipe, (1, MODEL.num_layers), own, base, prompt))
    np.testing.assert_allclose(mixed[:, :, 0], theirs[:, :, 0], atol=1e-6)
    assert np.abs(mixed[:, :, 1] - theirs[:, :, 1]).max() > 0.1
    # All layers, on the same embedding, are those of the fine-tune alone.
    same = {**own, "embed.embedding": base["embed.embedding"]}
    whole = np.asarray(recomputed_kv(recipe, (0, MODEL.num_layers), same, base, prompt))
    np.testing.assert_allclose(whole, plain(recipe, same, prompt), atol=1e-5)
