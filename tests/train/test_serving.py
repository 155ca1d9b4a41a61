"""A trained module is served as is, and answers as the oracle does with its weights."""

from __future__ import annotations

import jax.numpy as jnp

from pshare_jax.config import ModelEntry
from pshare_jax.convert.orbax import load_weights
from pshare_jax.engine.monolithic import Monolithic
from pshare_jax.engine.offline import Engine
from tests.engine.harness import MAX_LEN, serve_config
from tests.train.helpers import MODEL, chats


def test_served_tokens_are_the_oracles(plain_run, base, tokenizer):
    module = plain_run.folder / "decode_module"
    prompts = [
        tokenizer.encode(tokenizer.apply_chat_template(chat["messages"][:-1]), False)
        for chat in chats(2, seed=11) + chats(1, seed=12, turns=2)
    ]
    config = serve_config(base=str(base), models=[ModelEntry("trained", str(module))])
    with Engine.from_config(config) as engine:
        served = engine.generate("trained", prompts, max_tokens=8, ignore_eos=True)
    oracle = Monolithic(MODEL, MAX_LEN)
    weights = [load_weights(folder, dtype=jnp.float32) for folder in (base, module)]
    expected = [oracle.generate(*weights, prompt, 8, tail=2) for prompt in prompts]
    assert [completion.token_ids for completion in served] == expected
    # The base itself answers otherwise: it is the trained weights that were served.
    assert expected != [oracle.generate(weights[0], weights[0], p, 8, tail=2) for p in prompts]
