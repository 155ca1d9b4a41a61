"""The kernels alone: are their numbers right on this device, and how near do they come to it?"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pshare_jax.bench.hardware.device import mesh, seconds
from pshare_jax.bench.hardware.oracle import CASES, TOLERANCE, Case, attention_error
from pshare_jax.bench.hardware.scale import Scale
from pshare_jax.kernels.backends import backend_for
from pshare_jax.kernels.kv_write.api import kv_write
from pshare_jax.kernels.paged_attention.api import paged_attention
from pshare_jax.kernels.shared_prefix_attention.api import READS_RUNS_ONCE, shared_prefix_attention
from pshare_jax.runtime.layout import PageLayout
from pshare_jax.sharding.rules import replicated

Keep = Callable[[str, Any], None]
"""Writes a figure down under its name."""

COPY_BYTES = 2**30


@dataclass(frozen=True)
class _Rows:
    """Paged KV of one layer and queries at its end, on the device."""

    q: jax.Array
    pages: jax.Array
    table: jax.Array
    start: jax.Array
    lens: jax.Array

    @property
    def arguments(self) -> tuple[jax.Array, ...]:
        return self.q, self.pages, self.table, self.start, self.lens


def own_backend() -> str:
    """The kernels that serving would take here."""
    return backend_for("auto", jax.default_backend())


def run(scale: Scale, keep: Keep) -> None:
    """Correctness of each kernel, then rates. Keeps:

    `correct`: `{kernel: relative error}`, the largest of its cases, and `wrong`, those that are
    beyond their tolerance; `copy_gb_s`; `rates`: a list of `{"what", "backend", "us", "gb_s",
    "tflop_s"}`.
    """
    backend = own_backend()
    errors, wrong = check(backend)
    keep("correct", errors)
    keep("wrong", wrong)
    keep("copy_gb_s", copy_rate(scale))
    rates: list[dict[str, Any]] = []
    for rate in measured(scale, backend):
        rates.append(rate)
        keep("rates", rates)


def check(backend: str) -> tuple[dict[str, float], list[str]]:
    """Every case on this device: the largest error by kernel, and what is wrong, in words."""
    errors: dict[str, float] = {}
    wrong: list[str] = []
    for name, case in CASES.items():
        for dtype, tolerance in TOLERANCE.items():
            error = attention_error(case, dtype, functools.partial(_attend, case, backend))
            kernel = "shared_prefix_attention" if case.shared_pages else "paged_attention"
            if not error <= tolerance:  # NaN is wrong too
                wrong.append(f"{kernel}, {name}, {dtype}: relative error {error:.2g}")
            errors[kernel] = max(errors.get(kernel, 0.0), error)
    return errors, wrong


def _attend(case: Case, backend: str, *arguments: Any) -> jax.Array:
    options: dict[str, Any] = {
        "sliding_window": case.sliding_window,
        "soft_cap": case.soft_cap,
        "backend": backend,
        "mesh": mesh(),
    }
    if case.shared_pages:
        return jax.jit(functools.partial(shared_prefix_attention, **options))(*arguments)
    return jax.jit(functools.partial(paged_attention, **options))(*arguments)


def copy_rate(scale: Scale) -> float:
    """GB/s of reading and writing device memory by a plain addition."""
    count = COPY_BYTES // 4 if scale.least_seconds else 2**16
    x = jnp.zeros(count, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    took = seconds(lambda: add(x), scale.repeats, scale.least_seconds)
    return 2 * x.nbytes / took / 1e9


def measured(scale: Scale, backend: str) -> Iterator[dict[str, Any]]:
    """Rates of attention and of writing KV, by our kernels and by XLA's, of the large model."""
    backends = dict.fromkeys((backend, "xla"))
    decode = _rows(scale, scale.batch, 1)
    kv_bytes = _kv_bytes(scale, scale.batch * scale.context)
    for name in backends:
        yield _rate(scale, "decode attention", name, _call(paged_attention, decode, name), kv_bytes)
    shared = _one_context(scale, decode)
    members = jnp.arange(scale.batch, dtype=jnp.int32)[None]
    run_lens = jnp.full(1, (scale.context - 1) // scale.page_size * scale.page_size, jnp.int32)
    once = _kv_bytes(scale, scale.context)
    for name in backends:
        if name in READS_RUNS_ONCE:
            call = _call(shared_prefix_attention, shared, name, members, run_lens)
            yield _rate(scale, "decode attention, one shared context", name, call, once)
    chunk = _rows(scale, 1, scale.chunk)
    seen = scale.chunk * (scale.context - (scale.chunk - 1) / 2)
    flops = 4 * scale.large.num_heads * scale.large.head_dim * seen
    for name in backends:
        call = _call(paged_attention, chunk, name)
        yield _rate(scale, "prefill attention", name, call, flops=flops)
    for name in backends:
        yield _write_rate(scale, decode, name)


def _call(op: Callable[..., jax.Array], rows: _Rows, backend: str, *more: jax.Array) -> Any:
    compiled = jax.jit(functools.partial(op, backend=backend, mesh=mesh()))
    return lambda: compiled(*rows.arguments, *more)


def _rate(
    scale: Scale,
    what: str,
    backend: str,
    call: Callable[[], Any],
    moved: float = 0.0,
    flops: float = 0.0,
) -> dict[str, Any]:
    rate: dict[str, Any] = {"what": what, "backend": backend}
    try:
        took = seconds(call, scale.repeats, scale.least_seconds)
    except Exception as error:  # one kernel that does not compile must not hide the others
        return rate | {"error": " ".join(str(error).split())[:300]}
    return rate | {
        "us": 1e6 * took,
        "gb_s": moved / took / 1e9 if moved else None,
        "tflop_s": flops / took / 1e12 if flops else None,
    }


def _write_rate(scale: Scale, rows: _Rows, backend: str) -> dict[str, Any]:
    """Writing one token a row into donated pages."""
    shape = (scale.batch, 1, scale.large.num_kv_heads, scale.large.head_dim)
    new = jnp.ones(shape, scale.dtype)
    write = jax.jit(functools.partial(kv_write, backend=backend, mesh=mesh()), donate_argnums=0)
    pages = [jnp.copy(rows.pages)]

    def call() -> jax.Array:
        pages[0] = write(pages[0], new, new, rows.table, rows.start, rows.lens)
        return pages[0]

    return _rate(scale, "writing KV, one token a row", backend, call)


def _kv_bytes(scale: Scale, tokens: int) -> float:
    model = scale.large
    item = jnp.dtype(scale.dtype).itemsize
    return 2.0 * model.num_kv_heads * model.head_dim * item * tokens


def _rows(scale: Scale, batch: int, tokens: int) -> _Rows:
    """Rows of `context` positions in scattered pages, the last `tokens` of them queries."""
    model, where = scale.large, replicated(mesh())
    layout = PageLayout(1, model.num_kv_heads, model.head_dim, scale.page_size, scale.dtype)
    per_row = layout.pages_for(scale.context)
    count = batch * per_row + 1

    def random(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(key, shape, jnp.float32).astype(scale.dtype)

    pages = jax.jit(
        functools.partial(random, shape=layout.layer_shape(count)),
        out_shardings=layout.placement(where),
    )(jax.random.key(0))
    order = np.random.default_rng(0).permutation(np.arange(1, count)).astype(np.int32)
    q = random(jax.random.key(1), (batch, tokens, model.num_heads, model.head_dim))
    return _Rows(
        q,
        pages,
        jnp.asarray(order.reshape(batch, per_row)),
        jnp.full(batch, scale.context - tokens, jnp.int32),
        jnp.full(batch, tokens, jnp.int32),
    )


def _one_context(scale: Scale, rows: _Rows) -> _Rows:
    """The same rows, all of which have the first one's pages but for the last."""
    table = np.array(rows.table)
    shared = (scale.context - 1) // scale.page_size
    table[:, :shared] = table[0, :shared]
    assert math.prod(table.shape) == rows.table.size
    return _Rows(rows.q, rows.pages, jnp.asarray(table), rows.start, rows.lens)
