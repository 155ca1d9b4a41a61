"""Metrics of vLLM's whose labels carry what they tell: adapters in use, and the cache's shape.

Routers read them: Kubernetes' inference gateway sends a request where its adapter runs already.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pshare_jax.serve.engine_api import Engine


class EngineInfo(Collector):
    """Reads them off the engine when somebody asks."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        """The families; `vllm:lora_requests_info` has the time of the scrape as its value."""
        engine = self._engine
        stats = engine.stats()
        adapters = [name for name, model in list(engine.models.items()) if model.kind == "lora"]
        loras = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "LoRA modules with running and with waiting sequences; the value is the time.",
            labels=["running_lora_adapters", "waiting_lora_adapters", "max_lora"],
        )
        running = [name for name in adapters if stats.running.get(name, 0)]
        waiting = [name for name in adapters if stats.waiting.get(name, 0)]
        loras.add_metric([",".join(running), ",".join(waiting), str(len(adapters))], time.time())
        yield loras
        config = engine.config
        cache = GaugeMetricFamily(
            "vllm:cache_config_info",
            "The KV cache: tokens of a block, and blocks of all decode and all prefill pools.",
            labels=[
                "block_size",
                "num_gpu_blocks",
                "num_prefill_blocks",
                "cache_dtype",
                "enable_prefix_caching",
            ],
        )
        sides = {
            side: sum(pool.total for name, pool in stats.pools.items() if name.startswith(side))
            for side in ("decode", "prefill")
        }
        labels = [config.page_size, sides["decode"], sides["prefill"], config.dtype, True]
        cache.add_metric([str(label) for label in labels], 1)
        yield cache
