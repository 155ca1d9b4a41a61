"""Another way to share: the base's KV, but for some layers that the fine-tune computes itself.

After DroidSpeak (Liu et al., arXiv 2411.02820): an ordinary fine-tune reads the KV that another
model of its architecture wrote, and computes that of a few layers in a row anew, from the other
model's hidden states before them. It needs no training, and no token of the prompt is spared in
those layers.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pshare_jax.models.decoder import bind, rope_tables, scaled_embedding
from pshare_jax.models.weights import Weights
from pshare_jax.train.loss import KVRecorder, Recipe, bind_trainable


@functools.partial(jax.jit, static_argnums=(0, 1))
def recomputed_kv(
    recipe: Recipe, layers: tuple[int, int], own: Weights, base: Weights, prompt: jax.Array
) -> jax.Array:
    """KV of `prompt [B, P]` int32 from position 0 on, in the form of `train.loss.base_kv`.

    Args:
        recipe: static facts.
        layers: first and end of those whose KV is the fine-tune's.
        own: the fine-tune's weights, or its LoRA factors.
        base: the base's weights.
        prompt: token ids.
    """
    config, (first, end) = recipe.config, layers
    positions = jnp.broadcast_to(jnp.arange(prompt.shape[1]), prompt.shape)
    ropes = rope_tables(config, positions)
    theirs = bind(config, base)
    ours, adapters = bind_trainable(recipe, own, base, prompt.shape[0])
    x = scaled_embedding(config, theirs.embed(prompt))
    recorded = KVRecorder(config)
    entry = x
    for number, layer in enumerate(theirs.layers):
        if number == first:
            entry = x
        x = layer(x, ropes, recorded, None)
    anew = KVRecorder(config)
    for number in range(first, end):
        entry = ours.layers[number](entry, ropes, anew, adapters)
    return jnp.stack([*recorded.layers[:first], *anew.layers, *recorded.layers[end:]], axis=2)
