"""The training loss of a batch: one forward pass of the decode module over the base's KV."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pshare_jax.errors import ConfigError
from pshare_jax.models.attention import CausalAttention, causal_mask
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.decoder import Decoder, bind, looped_rope_tables
from pshare_jax.models.lora import Adapters, LoraModule, OneAdapter
from pshare_jax.models.packed import PackedDecoder, holds_packed
from pshare_jax.models.recompute import recomputed
from pshare_jax.models.weights import Weights
from pshare_jax.train.cross_entropy import cross_entropy, sum_over_chunks
from pshare_jax.train.memory_saving import BlockedCausalAttention, blocked_attention

Arrays = Mapping[str, jax.Array]
"""A batch as `layout.collate` makes it."""


@dataclass(frozen=True)
class LoraShape:
    """Rank, scale and targets of the LoRA module that is trained."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """What a loss depends on besides arrays; hashable, so that it can be static under jit.

    Args:
        config: the architecture of base and decode module.
        dtype: dtype name of weights and activations within the computation.
        lora: the shape of the LoRA module, or None for a full module.
        teacher: the teacher's architecture when distilling.
        remat: whether layers are computed again for the gradient.
        barriers: whether the compiler keeps the barriers that `jax.checkpoint` relies on; XLA for
            CPUs does not. There logits are computed in chunks, see `cross_entropy`.
        matmul: backend of the decoder's products, see `kernels/matmul`.
        loss: the user's own, see `TrainConfig.loss`; None for the usual one.
    """

    config: ModelConfig
    dtype: str
    lora: LoraShape | None = None
    teacher: ModelConfig | None = None
    remat: bool = False
    matmul: str = "xla"
    loss: Callable[..., jax.Array] | None = None
    barriers: bool = True


class KVRecorder(CausalAttention):
    """Causal attention that keeps each layer's keys and values."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.layers: list[jax.Array] = []

    def store(self, layer: int, k: jax.Array, v: jax.Array) -> None:
        """Keeps k and v."""
        del layer
        self.layers.append(jnp.stack([k, v], axis=2))

    def attend(
        self,
        layer: int,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        sinks: jax.Array | None = None,
    ) -> jax.Array:
        """Keeps k and v, and attends within the tokens."""
        self.store(layer, k, v)
        return super().attend(layer, q, k, v, sinks)


def base_kv(recipe: Recipe, weights: Weights, prompt: jax.Array) -> jax.Array:
    """The prefill module's KV of `prompt [B, P]` from position 0 on.

    Args:
        recipe: static facts.
        weights: the prefill module's, as they are or packed for the C++ layers.
        prompt: int32 token ids.

    Returns:
        `[B, P, layers, 2, kv_heads, head_dim]` of the recipe's dtype. Tokens of one row lie
        together, so that rows can be kept and gathered at their own lengths.
    """
    if holds_packed(weights):
        return _packed_kv(recipe, weights, prompt)
    recorder = KVRecorder(recipe.config)
    positions = jnp.broadcast_to(jnp.arange(prompt.shape[1]), prompt.shape)
    _bind(recipe, recipe.config, weights).write_kv(prompt, positions, recorder)
    return jnp.stack(recorder.layers, axis=2)


def _packed_kv(recipe: Recipe, weights: Weights, prompt: jax.Array) -> jax.Array:
    """As the engine computes it, with one page for each row."""
    config, (size, length) = recipe.config, prompt.shape
    page = (size, 2, config.num_kv_heads, length, config.head_dim)
    pages = [jnp.zeros(page, recipe.dtype) for _ in range(config.num_layers)]
    table = jnp.arange(size, dtype=jnp.int32)[:, None]
    rows = table, jnp.zeros(size, jnp.int32), jnp.full(size, length, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), prompt.shape)
    decoder = PackedDecoder(config, weights)
    _, pages = decoder.hidden(prompt, positions, pages, rows, kv_only=True)
    return jnp.stack(pages, axis=1).transpose(0, 4, 1, 2, 3, 5)


class SplitAttention:
    """Attention over [the prefill module's KV ; the decode module's own], by segments.

    A token sees the prefill module's positions below its cover, and the tokens of its segment at
    its own and earlier positions; both within the sliding window.

    Args:
        config: the architecture.
        kv: as `base_kv` gives it; None when no token is covered.
        batch: `positions`, `segments` and `covers`.
        backend: as for `blocked_attention`.
    """

    def __init__(
        self, config: ModelConfig, kv: jax.Array | None, batch: Arrays, backend: str = "xla"
    ):
        self._kv = kv
        self._backend = backend
        self._config = config
        windows = {spec.sliding_window for spec in config.layer_specs}
        # Made before the layers run, which may be traced apart (`remat`).
        self._masks = {window: _split_mask(window, kv, batch) for window in windows}

    def store(self, layer: int, k: jax.Array, v: jax.Array) -> None:
        """Drops k and v: later tokens are in the same call."""

    def attend(
        self,
        layer: int,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        sinks: jax.Array | None = None,
    ) -> jax.Array:
        """See `AttentionIO.attend`."""
        if self._kv is not None:
            base = self._kv[:, :, layer].astype(k.dtype)
            k = jnp.concatenate([base[:, :, 0], k], axis=1)
            v = jnp.concatenate([base[:, :, 1], v], axis=1)
        mask = self._masks[self._config.layer(layer).sliding_window]
        return blocked_attention(
            q,
            k,
            v,
            mask,
            self._config.attention_soft_cap,
            sinks,
            constant_keys=0 if self._kv is None else self._kv.shape[1],
            backend=self._backend,
        )


def _split_mask(window: int | None, kv: jax.Array | None, batch: Arrays) -> jax.Array:
    positions, segments = batch["positions"], batch["segments"]
    own = causal_mask(positions, positions[:, None, :], window)
    own &= segments[:, :, None] == segments[:, None, :]
    if kv is None:
        return own
    slots = jnp.arange(kv.shape[1])
    base = causal_mask(positions, slots, window) & (slots < batch["covers"][..., None])
    return jnp.concatenate([base, own], axis=-1)


def bind_trainable(
    recipe: Recipe, trainable: Weights, base: Weights | None, batch_size: int
) -> tuple[Decoder, Adapters | None]:
    """The decode module of weights in training: a decoder, and LoRA adapters for each row.

    Args:
        recipe: static facts.
        trainable: full weights, or LoRA factors.
        base: the base's weights below LoRA factors; not used for a full module.
        batch_size: rows that the adapters are for.
    """
    if (lora := recipe.lora) is None:
        return _bind(recipe, recipe.config, trainable), None
    assert base is not None
    own = _cast(trainable, recipe.dtype)
    adapters = OneAdapter(LoraModule(own, lora.alpha, lora.rank, lora.targets), batch_size)
    return _bind(recipe, recipe.config, base), adapters


def target_logits(
    recipe: Recipe,
    trainable: Weights,
    base: Weights | None,
    kv: jax.Array | None,
    batch: Arrays,
) -> jax.Array:
    """The decode module's logits after each target token: `[B, Y, vocab]` float32.

    Args:
        recipe: static facts.
        trainable: full weights, or LoRA factors.
        base: the base's weights below LoRA factors; not used for a full module.
        kv: the prefill module's KV of `batch["prompt"]`, or None.
        batch: see `layout.collate`.
    """
    decoder, hidden = _target_hidden(recipe, trainable, base, kv, batch)
    return decoder.logits(hidden)


def _target_hidden(
    recipe: Recipe,
    trainable: Weights,
    base: Weights | None,
    kv: jax.Array | None,
    batch: Arrays,
) -> tuple[Decoder, jax.Array]:
    """The decode module, and its last hidden state at each target: `[B, Y, embed]`."""
    decoder, adapters = bind_trainable(recipe, trainable, base, batch["tokens"].shape[0])
    attention = SplitAttention(recipe.config, kv, batch, recipe.matmul)
    remat = None
    if recipe.remat:
        remat = jax.checkpoint if recipe.barriers else recomputed
    positions = batch["positions"]
    ropes = None if recipe.barriers else looped_rope_tables(recipe.config, positions)
    hidden = decoder.hidden(
        batch["tokens"], positions, attention, adapters, remat=remat, ropes=ropes
    )
    return decoder, _pick(hidden, batch["targets"])


def _teacher_hidden(recipe: Recipe, weights: Weights, batch: Arrays) -> tuple[Decoder, jax.Array]:
    """The teacher, and its last hidden state, with its own KV, at the same targets."""
    assert recipe.teacher is not None
    sequence = batch["sequence"]
    decoder = _bind(recipe, recipe.teacher, weights)
    positions = jnp.broadcast_to(jnp.arange(sequence.shape[1]), sequence.shape)
    attention = BlockedCausalAttention(recipe.teacher, recipe.matmul)
    hidden = decoder.hidden(sequence, positions, attention)
    return decoder, _pick(hidden, batch["sequence_targets"])


def loss_sum(
    recipe: Recipe,
    trainable: Weights,
    frozen: Mapping[str, Weights],
    kv: jax.Array | None,
    batch: Arrays,
) -> jax.Array:
    """The loss in nats, summed over the batch's target tokens by their weights; float32 scalar.

    Cross-entropy with the labels or, with a teacher, the divergence KL(teacher || decode module)
    (Hinton et al., arXiv 1503.02531, at temperature 1); or the user's own.

    Args:
        recipe: static facts.
        trainable: full weights, or LoRA factors; the only input with a gradient.
        frozen: `base` for LoRA, `teacher` when distilling.
        kv: the prefill module's KV, a constant.
        batch: see `layout.collate`.
    """
    decoder, hidden = _target_hidden(recipe, trainable, frozen.get("base"), kv, batch)
    targets = {name: batch[name] for name in ("labels", "weights")}
    teacher: Decoder | None = None
    if recipe.teacher is not None:
        teacher, targets["teacher"] = _teacher_hidden(recipe, frozen["teacher"], batch)

    def losses(hidden: jax.Array, targets: Arrays) -> jax.Array:
        logits = decoder.logits(hidden)
        wanted = teacher.logits(targets["teacher"]) if teacher is not None else None
        return jnp.sum(_losses(recipe, logits, wanted, targets) * targets["weights"])

    # The user's own loss may look at all targets of a row.
    if not recipe.barriers and recipe.loss is None:
        return sum_over_chunks(losses, hidden, targets)
    return losses(hidden, targets)


def _losses(
    recipe: Recipe, logits: jax.Array, teacher: jax.Array | None, batch: Arrays
) -> jax.Array:
    """The loss of each target: `[B, Y]` float32."""
    if recipe.loss is not None:
        own = {name: batch[name] for name in ("labels", "weights")}
        if teacher is not None:
            own["teacher_logits"] = teacher
        losses = recipe.loss(logits, own)
        if losses.shape != logits.shape[:2]:
            raise ConfigError(
                f"loss: gave shape {list(losses.shape)}, but one loss for each target is "
                f"{list(logits.shape[:2])}"
            )
        return losses.astype(jnp.float32)
    if teacher is None:
        return cross_entropy(logits, batch["labels"])
    log_probs = jax.nn.log_softmax(logits)
    wanted = jax.nn.log_softmax(teacher)
    return jnp.sum(jnp.exp(wanted) * (wanted - log_probs), axis=-1)


def _bind(recipe: Recipe, config: ModelConfig, weights: Weights) -> Decoder:
    return bind(config, _cast(weights, recipe.dtype), recipe.matmul)


def _cast(weights: Weights, dtype: str) -> Weights:
    return {name: weight.astype(dtype) for name, weight in weights.items()}


def _pick(hidden: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.take_along_axis(hidden, targets[..., None], axis=1)
