"""The C++ layers against the decoder in XLA, over the same pages, for every kind of model."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.kernels.decoder_layer.packing import unpack_columns
from pshare_jax.kernels.kv_write.api import kv_write
from pshare_jax.kernels.native.library import require_library
from pshare_jax.kernels.paged_attention.api import paged_attention
from pshare_jax.models.config import Experts, ModelConfig
from pshare_jax.models.decoder import bind, init_weights
from pshare_jax.models.lora import Adapters, LoraModule
from pshare_jax.models.packed import PackedDecoder, pack_adapters, pack_weights
from pshare_jax.models.weights import LORA_TARGETS, lora_specs
from tests.helpers import ARCHITECTURES, on_device, stacked, tiny_config
from tests.pairwise import some

PAGE, WIDTH, TOKENS = 4, 24, 7
START = np.asarray([70, 0, 5, 11], np.int32)
LENS = np.asarray([7, 5, 0, 1], np.int32)
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
"""Relative error against the numbers of float32."""

CONFIGS = {
    **{name: tiny_config(architecture=name) for name in ARCHITECTURES},
    **{
        name: tiny_config(architecture=name)
        for name in (
            "gemma2",
            "gemma3",
            "smollm3",
            "granite",
            "phi3",
            "olmo2",
            "mixtral",
            "gpt_oss",
        )
    },
    "biases everywhere": tiny_config(qkv_bias=True, o_bias=True, mlp_bias=True),
    "experts of odd sizes": tiny_config(
        architecture="mixtral",
        hidden_size=51,
        intermediate_size=77,
        experts=Experts(37, 5, 33, normalised=False, biases=True),
    ),
    "odd sizes": tiny_config(hidden_size=51, intermediate_size=77, vocab_size=131, head_dim=10),
    "more than one panel of everything": tiny_config(
        architecture="qwen2", hidden_size=96, intermediate_size=200, num_heads=6, head_dim=48
    ),
}


class PagedIO:
    """AttentionIO over pages, with attention by a backend in plain XLA."""

    def __init__(self, config: ModelConfig, pages, rows, backend: str):
        self.pages = list(pages)
        self._config = config
        self._rows = rows
        self._backend = backend

    def store(self, layer, k, v):
        self.pages[layer] = kv_write(self.pages[layer], k, v, *self._rows)

    def attend(self, layer, q, k, v, sinks=None):
        self.store(layer, k, v)
        window = self._config.layer(layer).sliding_window
        soft_cap = self._config.attention_soft_cap
        return paged_attention(
            q,
            self.pages[layer],
            *self._rows,
            sliding_window=window,
            soft_cap=soft_cap,
            sinks=sinks,
            backend=self._backend,
        )


def batch(config: ModelConfig, dtype: str):
    """Tokens, positions, rows, and pages with NaN wherever nothing may be looked at."""
    rng = np.random.default_rng(0)
    table = rng.permutation(np.arange(1, 4 * WIDTH + 1)).reshape(4, WIDTH).astype(np.int32)
    shape = (4 * WIDTH + 1, 2, config.num_kv_heads, PAGE, config.head_dim)
    pages = []
    for _ in range(config.num_layers):
        layer = np.full(shape, np.nan, np.float32)
        for row, start in enumerate(START):
            for position in range(start):
                page, slot = divmod(position, PAGE)
                layer[table[row, page], :, :, slot] = rng.standard_normal(
                    (2, config.num_kv_heads, config.head_dim)
                )
        pages.append(on_device(layer, dtype))
    tokens = rng.integers(0, config.vocab_size, (4, TOKENS)).astype(np.int32)
    positions = START[:, None] + np.arange(TOKENS, dtype=np.int32)
    return tokens, positions, (table, START, LENS), tuple(pages)


@functools.partial(jax.jit, static_argnums=0, static_argnames="attention")
def in_xla(
    config, weights, adapters, index, tokens, positions, rows, pages, *, attention="reference"
):
    """The logits of all tokens, and the pages. By default attention is that of the definition,
    which compiles in half the time; the one that serves is compared with it by its own tests."""
    io = PagedIO(config, pages, rows, attention)
    decoder = bind(config, weights)
    stacked = None if adapters is None else Adapters(adapters, index)
    hidden = decoder.hidden(tokens, positions, io, stacked)
    return decoder.logits(hidden), tuple(io.pages)


@functools.partial(jax.jit, static_argnums=0, static_argnames="kv_only")
def in_cpp(config, weights, adapters, index, tokens, positions, rows, pages, *, kv_only=False):
    """The logits of each row's last token, the most likely token, and the pages."""
    decoder = PackedDecoder(config, weights, adapters, index)
    hidden, pages = decoder.hidden(tokens, positions, pages, rows, kv_only=kv_only)
    last = jnp.maximum(rows[2] - 1, 0)
    ends = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return *decoder.logits(ends, rows[2], jnp.asarray(True)), pages


@functools.partial(jax.jit, static_argnums=0)
def in_cpp_and_kv_only(config, *args):
    """What `in_cpp` gives, and the pages that it gives with `kv_only`; one program."""
    return *in_cpp(config, *args), in_cpp(config, *args, kv_only=True)[2]


def random_lora(config: ModelConfig, rank: int, targets, alpha: float, seed: int, dtype: str):
    rng = np.random.default_rng(seed)
    weights = {
        name: on_device(0.3 * rng.standard_normal(spec.shape), dtype)
        for name, spec in lora_specs(config, rank, targets).items()
    }
    return LoraModule(weights, alpha, rank, tuple(targets))


def widened(arrays):
    """The same numbers in float32: what XLA, which is slow to compile, gets for every dtype."""
    return jax.tree.map(
        lambda array: on_device(array) if array.dtype == jnp.bfloat16 else array, arrays
    )


def assert_close(actual, expected, dtype: str) -> None:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert np.isfinite(actual).all()
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert error <= TOLERANCE[dtype], error


def written(pages, table) -> np.ndarray:
    """What the call wrote: `[valid tokens, 2, kv_heads, head_dim]` of every layer."""
    return np.stack(
        [
            np.asarray(layer, np.float32)[table[row, position // PAGE], :, :, position % PAGE]
            for layer in pages
            for row in range(4)
            for position in range(START[row], START[row] + LENS[row])
        ]
    )


def assert_same_as_xla(config: ModelConfig, dtype: str, modules=(), index=(0, 0, 0, 0)) -> None:
    weights = init_weights(config, 1, jnp.dtype(dtype))
    index = np.asarray(index, np.int32)
    adapters = stacked(modules) if modules else None
    packed = pack_adapters(config, adapters) if modules else None
    inputs = batch(config, dtype)
    table = inputs[2][0]

    expected, expected_pages = in_xla(
        config, widened(weights), widened(adapters), index, *widened(inputs)
    )
    logits, best, pages, kv_only = in_cpp_and_kv_only(
        config, pack_weights(config, weights), packed, index, *inputs
    )

    valid = np.flatnonzero(LENS)
    logits = np.asarray(logits)
    assert_close(logits[valid], np.asarray(expected)[valid, LENS[valid] - 1], dtype)
    assert_close(written(pages, table), written(expected_pages, table), dtype)
    np.testing.assert_array_equal(written(pages, table), written(kv_only, table))
    np.testing.assert_array_equal(best, logits.argmax(axis=-1))
    assert not logits[LENS == 0].any()
    for before, after in zip(inputs[3], pages, strict=True):
        # Nothing else is touched, the pages of empty rows included.
        same = np.isnan(np.asarray(before, np.float32)) == np.isnan(np.asarray(after, np.float32))
        changed = {
            (table[r, p // PAGE], p % PAGE)
            for r in range(4)
            for p in range(START[r], START[r] + LENS[r])
        }
        where = np.argwhere(~same.all(axis=(1, 2, 4)))
        assert {tuple(place) for place in where} <= changed


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CONFIGS)
def test_same_numbers_as_xla(name, dtype):
    assert_same_as_xla(CONFIGS[name], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["qwen2", "odd sizes"])
def test_adapters_of_unlike_shape_in_one_batch(name, dtype):
    config = CONFIGS[name]
    modules = [
        random_lora(config, 3, LORA_TARGETS, 6.0, 1, dtype),
        random_lora(config, 16, ("q", "v"), 2.0, 2, dtype),
        random_lora(config, 40, ("o", "gate", "down"), 20.0, 3, dtype),
    ]
    assert_same_as_xla(config, dtype, modules, (2, 0, 1, -1))
    assert_same_as_xla(config, dtype, modules, (1, -1, 0, 1))


def test_a_broken_adapter_harms_no_other_row():
    config = CONFIGS["llama"]
    whole = random_lora(config, 4, LORA_TARGETS, 4.0, 1, "float32")
    broken = whole._replace(weights={n: w * np.nan for n, w in whole.weights.items()})
    weights, inputs = pack_weights(config, init_weights(config, 1)), batch(config, "float32")
    index = np.asarray([0, -1, 0, 1], np.int32)
    logits = {
        name: np.asarray(
            in_cpp(config, weights, pack_adapters(config, stacked(pair)), index, *inputs)[0]
        )
        for name, pair in {"good": [whole, whole], "bad": [whole, broken]}.items()
    }
    np.testing.assert_array_equal(logits["good"][:2], logits["bad"][:2])
    assert np.isnan(logits["bad"][3]).all()


def assert_rows_of_the_base_are_the_same(run, config, base, adapters, inputs) -> None:
    """To the bit, logits and KV, whatever adapters are loaded or used beside."""
    seen = []
    for used, index in ((None, (0,) * 4), (adapters, (-1,) * 4), (adapters, (-1, 0, 0, 1))):
        out = run(config, base, used, np.asarray(index, np.int32), *inputs)
        table = inputs[2][0]
        kv = [np.asarray(layer, np.float32)[table[0]] for layer in out[-1]]
        # Of XLA's tokens past a row's length anything may come.
        logits = np.asarray(out[0])[0]
        seen.append((logits if run is in_cpp else logits[: LENS[0]], *kv))
    for other in seen[1:]:
        for expected, actual in zip(seen[0], other, strict=True):
            np.testing.assert_array_equal(actual, expected)


def with_adapters(name: str, dtype: str):
    """A configuration, weights, stacked adapters and inputs."""
    config = CONFIGS[name]
    targets = tuple("qkvo") if config.has_experts else LORA_TARGETS
    modules = [random_lora(config, r, targets, 4.0, r, dtype) for r in (3, 16)]
    weights = init_weights(config, 1, jnp.dtype(dtype))
    return config, weights, stacked(modules), batch(config, dtype)


@pytest.mark.parametrize(
    ("name", "dtype"),
    some(itertools.product(CONFIGS, TOLERANCE), zip(CONFIGS, itertools.cycle(TOLERANCE))),
)
def test_rows_of_the_base_are_the_same_among_rows_of_adapters(name, dtype):
    config, weights, unpacked, inputs = with_adapters(name, dtype)
    base, adapters = pack_weights(config, weights), pack_adapters(config, unpacked)
    assert_rows_of_the_base_are_the_same(in_cpp, config, base, adapters, inputs)


IN_XLA = {"qwen2": "float32", "gpt_oss": "float32", "llama": "bfloat16"}


@pytest.mark.parametrize(
    ("name", "dtype"), some(itertools.product(CONFIGS, TOLERANCE), IN_XLA.items())
)
def test_rows_of_the_base_are_the_same_among_rows_of_adapters_in_xla(name, dtype):
    config, weights, adapters, inputs = with_adapters(name, dtype)
    served = functools.partial(in_xla, attention="xla")
    assert_rows_of_the_base_are_the_same(served, config, weights, adapters, inputs)


def test_a_tied_head_gives_the_embedding_back():
    config = tiny_config(hidden_size=51, vocab_size=131, tie_word_embeddings=True)
    for dtype in (jnp.float32, jnp.bfloat16):
        weights = init_weights(config, 1, jnp.dtype(dtype))
        packed = pack_weights(config, weights)
        assert "embed.embedding" not in packed
        tokens = jnp.asarray([[0, 130, 31], [32, 64, 7]], jnp.int32)
        columns = require_library().panel_columns
        found = unpack_columns(packed["head"], config.hidden_size, columns, tokens)
        np.testing.assert_array_equal(found, weights["embed.embedding"][tokens])
    assert "embed.embedding" in pack_weights(tiny_config(), init_weights(tiny_config(), 1))


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_best_token_is_one_that_may_be(dtype, wanted):
    """Whatever the mask, and with equal logits the first; logits are those without it."""
    config = tiny_config(hidden_size=51, vocab_size=131)
    weights = init_weights(config, 1, jnp.dtype(dtype))
    head = np.array(weights["lm_head.kernel"])
    head[:, 70:] = head[:, :61]
    weights["lm_head.kernel"] = jax.device_put(head)
    decoder = PackedDecoder(config, pack_weights(config, weights))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((8, 51)), jnp.float32)
    lens = np.asarray([1, 1, 1, 1, 0, 1, 1, 1], np.int32)
    may = rng.random((8, 160)) < np.asarray([0.5, 0.02, 1.0, 0.0, 0.5, 0.1, 0.9, 0.5])[:, None]
    may[5] = np.arange(160) == 130
    mask = np.packbits(may, axis=1, bitorder="little").view(np.uint32)
    plain, best = decoder.logits(x, lens, jnp.asarray(True))
    np.testing.assert_array_equal(best, np.argmax(plain, axis=1))
    logits, chosen = decoder.logits(x, lens, jnp.asarray(wanted), mask)
    if wanted:
        np.testing.assert_array_equal(logits, plain)
    allowed = np.where(may[:, :131], plain, -np.inf)
    np.testing.assert_array_equal(chosen, np.where(lens, np.argmax(allowed, axis=1), 0))
    assert chosen[5] == 130


def test_a_mask_that_does_not_fit_is_an_error():
    config = tiny_config(vocab_size=131)
    decoder = PackedDecoder(config, pack_weights(config, init_weights(config, 1)))
    x, lens = jnp.zeros((2, config.hidden_size)), np.ones(2, np.int32)
    for shape in ((2, 4), (1, 5)):
        with pytest.raises(Exception, match="the mask is of another vocabulary or batch"):
            decoder.logits(x, lens, jnp.asarray(False), np.zeros(shape, np.uint32))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["qwen3", "gpt_oss", "experts of odd sizes"])
def test_a_row_depends_on_nothing_beside_it(name, dtype):
    """To the bit: alone, in a batch, in one chunk or token by token."""
    config = CONFIGS[name]
    weights = pack_weights(config, init_weights(config, 1, jnp.dtype(dtype)))
    targets = tuple("qkvo") if config.has_experts else LORA_TARGETS
    modules = [random_lora(config, r, targets, 4.0, r, dtype) for r in (2, 5)]
    adapters, index = pack_adapters(config, stacked(modules)), np.asarray([1, 0, 0, -1])
    index = index.astype(np.int32)
    tokens, positions, rows, pages = batch(config, dtype)
    logits, _, after = in_cpp(config, weights, adapters, index, tokens, positions, rows, pages)
    alone = pages
    for i in range(LENS[0]):
        one = (rows[0][:1], START[:1] + i, np.ones(1, np.int32))
        out, best, alone = in_cpp(
            config,
            weights,
            adapters,
            index[:1],
            tokens[:1, i : i + 1],
            positions[:1, i : i + 1],
            one,
            alone,
        )
    np.testing.assert_array_equal(out[0], logits[0])
    assert best[0] == np.asarray(logits[0]).argmax()
    for whole, single in zip(after, alone, strict=True):
        own = rows[0][0]
        np.testing.assert_array_equal(
            np.asarray(whole, np.float32)[own], np.asarray(single, np.float32)[own]
        )


def test_bfloat16_stays_near_float32():
    config = CONFIGS["more than one panel of everything"]
    weights = init_weights(config, 1)
    half = {name: on_device(w, jnp.bfloat16) for name, w in weights.items()}
    index = np.zeros(4, np.int32)
    wide = in_xla(config, weights, None, index, *batch(config, "float32"))[0]
    narrow = in_cpp(config, pack_weights(config, half), None, index, *batch(config, "bfloat16"))[0]
    valid = np.flatnonzero(LENS)
    expected = np.asarray(wide)[valid, LENS[valid] - 1]
    error = np.linalg.norm(narrow[valid] - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.02, error


def test_pages_of_another_dtype_are_refused():
    config = CONFIGS["llama"]
    weights = pack_weights(config, init_weights(config, 1))
    with pytest.raises(ValueError, match="pages are bfloat16, but weights are float32"):
        in_cpp(config, weights, None, np.zeros(4, np.int32), *batch(config, "bfloat16"))


def test_weights_of_another_model_are_refused():
    config, other = CONFIGS["llama"], tiny_config(intermediate_size=96)
    weights = pack_weights(config, init_weights(config, 1))
    with pytest.raises(jax.errors.JaxRuntimeError, match="packed weights are of another model"):
        jax.block_until_ready(
            in_cpp(other, weights, None, np.zeros(4, np.int32), *batch(other, "float32"))
        )
