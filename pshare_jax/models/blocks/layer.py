"""A decoder layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from pshare_jax.models.attention import AttentionIO
from pshare_jax.models.blocks.attention import Attention, RopeTables
from pshare_jax.models.blocks.experts import ExpertsBackend, ExpertsMLP
from pshare_jax.models.blocks.linear import RMSNorm
from pshare_jax.models.blocks.mlp import MLP
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.lora import Adapters
from pshare_jax.models.weights import Weights


class DecoderLayer(nnx.Module):
    """Attention and feed-forward block, each with norms and a residual.

    Args:
        path: name of the layer's weights.
        weights: the flat dict that has them.
        config: the decoder's.
        layer: number of the layer.
        backend: of its products, see `kernels/matmul`.
        experts: of its experts.
    """

    def __init__(
        self,
        path: str,
        weights: Weights,
        config: ModelConfig,
        layer: int,
        backend: str,
        experts: ExpertsBackend,
    ):
        def norm(name: str, wanted: bool) -> RMSNorm | None:
            if not wanted:
                return None
            eps, adds_one = config.rms_norm_eps, config.norm_adds_one
            return RMSNorm(f"{path}.{name}", weights, eps, adds_one=adds_one)

        before, after = config.norms != "after", config.norms != "before"
        self.attn_norm = norm("attn_norm", before)
        self.attn = Attention(f"{path}.attn", weights, config, layer, backend)
        self.attn_post_norm = norm("attn_post_norm", after)
        self.mlp_norm = norm("mlp_norm", before)
        about = config.layer(layer).experts
        self.mlp = None if about else MLP(f"{path}.mlp", weights, config.activation, backend)
        self.experts = about and ExpertsMLP(f"{path}.experts", weights, about, experts)
        self.mlp_post_norm = norm("mlp_post_norm", after)
        self.residual_scale = config.residual_scale

    def __call__(
        self, x: jax.Array, ropes: RopeTables, attention: AttentionIO, adapters: Adapters | None
    ) -> jax.Array:
        """`[B, T, embed]` -> `[B, T, embed]`."""
        attended = self.attn(_normed(self.attn_norm, x), ropes, attention, adapters)
        x = self._add(x, _normed(self.attn_post_norm, attended))
        return self._add(
            x, _normed(self.mlp_post_norm, self._fed(_normed(self.mlp_norm, x), adapters))
        )

    def kv(
        self, x: jax.Array, ropes: RopeTables, adapters: Adapters | None
    ) -> tuple[jax.Array, jax.Array]:
        """Keys and values alone, see `Attention.kv`."""
        return self.attn.kv(_normed(self.attn_norm, x), ropes, adapters)

    def _fed(self, x: jax.Array, adapters: Adapters | None) -> jax.Array:
        if self.mlp is not None:
            return self.mlp(x, adapters)
        assert self.experts is not None
        return self.experts(x)

    def _add(self, x: jax.Array, update: jax.Array) -> jax.Array:
        if self.residual_scale == 1.0:
            return x + update
        return x + update * jnp.asarray(self.residual_scale, update.dtype)


def _normed(norm: RMSNorm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)
