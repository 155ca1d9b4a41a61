"""The attention of PyTorch, of the same shapes: FlashAttention where the GPU has it.

It reads K and V that lie densely, without page tables, which is an advantage. In decode the heads
of a group are queries of one KV head that see all keys: the shape in which it is quickest.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

from pshare_jax.bench.hardware.device import SkippedError
from pshare_jax.bench.hardware.kernels import Keep
from pshare_jax.bench.hardware.scale import Scale


def run(scale: Scale, keep: Keep) -> None:
    """Keeps `torch`, its version, and `rates` as `kernels.run` does; `backend` is PyTorch's.

    Raises:
        SkippedError: PyTorch is not installed, or has no GPU.
    """
    if importlib.util.find_spec("torch") is None:
        raise SkippedError("PyTorch is not installed")
    # By name: nothing of this project needs it.
    torch: Any = importlib.import_module("torch")
    for part in ("attention", "attention.bias"):
        importlib.import_module(f"torch.nn.{part}")
    if not torch.cuda.is_available():
        raise SkippedError("PyTorch has no GPU here")
    keep("torch", torch.__version__)
    rates: list[dict[str, Any]] = []
    for name, backend in _backends(torch).items():
        for rate in _measured(torch, scale, name, backend):
            rates.append(rate)
            keep("rates", rates)


def _backends(torch: Any) -> dict[str, Any]:
    kinds = torch.nn.attention.SDPBackend
    return {"torch flash": kinds.FLASH_ATTENTION, "torch cudnn": kinds.CUDNN_ATTENTION}


def _measured(torch: Any, scale: Scale, name: str, backend: Any) -> list[dict[str, Any]]:
    model, dtype = scale.large, getattr(torch, scale.dtype)
    heads, kv_heads, size = model.num_heads, model.num_kv_heads, model.head_dim

    def random(*shape: int) -> Any:
        return torch.randn(shape, device="cuda", dtype=dtype)

    attend = torch.nn.functional.scaled_dot_product_attention
    keys = random(2, scale.batch, kv_heads, scale.context, size)
    queries = random(scale.batch, kv_heads, heads // kv_heads, size)
    moved = keys.nbytes

    chunk_keys = random(2, 1, heads, scale.context, size)
    chunk = random(1, heads, scale.chunk, size)
    mask = torch.nn.attention.bias.causal_lower_right(scale.chunk, scale.context)
    flops = 4 * heads * size * scale.chunk * (scale.context - (scale.chunk - 1) / 2)
    calls: list[tuple[str, Callable[[], Any], float, float]] = [
        ("decode attention", lambda: attend(queries, keys[0], keys[1]), moved, 0.0),
        (
            "prefill attention",
            lambda: attend(chunk, chunk_keys[0], chunk_keys[1], attn_mask=mask),
            0.0,
            flops,
        ),
    ]
    found = []
    for what, call, bytes_, operations in calls:
        rate: dict[str, Any] = {"what": what, "backend": name}
        try:
            with torch.nn.attention.sdpa_kernel(backend):
                took = _seconds(torch, call, scale.repeats, scale.least_seconds)
        except RuntimeError as error:  # a backend that this GPU or shape does not have
            found.append(rate | {"error": " ".join(str(error).split())[:300]})
            continue
        found.append(
            rate
            | {
                "us": 1e6 * took,
                "gb_s": bytes_ / took / 1e9 if bytes_ else None,
                "tflop_s": operations / took / 1e12 if operations else None,
            }
        )
    return found


def _seconds(torch: Any, call: Callable[[], Any], repeats: int, least: float) -> float:
    """As `device.seconds`, for PyTorch."""

    def once(calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / calls

    once(3)
    calls = max(1, int(least / max(once(1), 1e-6)))
    return statistics.median(once(calls) for _ in range(repeats))
