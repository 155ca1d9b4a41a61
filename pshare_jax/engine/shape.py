"""What the processes of a cluster must agree on, from a configuration and its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pshare_jax.cluster.wire import Shape, model_digest
from pshare_jax.config import ServeConfig
from pshare_jax.core.models import ModelSpec
from pshare_jax.engine.sources import BaseSource, ModelSource


def dtype_of_pages(pages: str, computed: str) -> str:
    """What pages hold, as processes tell each other: the same for all whose KV is the same.

    Args:
        pages: their dtype.
        computed: the dtype that is computed in, which pages of 8 bits do not say.
    """
    return pages if pages == computed else f"{pages} of {computed}"


def cluster_shape(
    config: ServeConfig,
    base: BaseSource,
    sources: Sequence[ModelSource],
    specs: Mapping[str, ModelSpec],
    dtype: str = "",
) -> Shape:
    """The shape of one process.

    Args:
        config: the serving configuration.
        base: the prefill module.
        sources: the served models.
        specs: the same as the engine knows them.
        dtype: of pages; empty for a process that touches none.
    """
    model = base.config
    return Shape(
        fingerprint=base.kv_name,
        max_model_len=config.max_model_len,
        page=(model.num_layers, model.num_kv_heads, config.page_size, model.head_dim),
        dtype=dtype,
        models={source.name: _digest(source, specs[source.name]) for source in sources},
    )


def _digest(source: ModelSource, spec: ModelSpec) -> str:
    weights = source.certificate.weights_fingerprint if source.certificate else ""
    return model_digest(spec.kind, spec.sharing, spec.split_rule.to_json(), spec.namespace, weights)
