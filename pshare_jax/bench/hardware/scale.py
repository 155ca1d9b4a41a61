"""How large everything of `bench hardware` is: for an accelerator, or to run in seconds."""

from __future__ import annotations

from dataclasses import dataclass

from pshare_jax.bench.compile_models import MODELS
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.rope import Llama3RopeScaling

SHAPE_1B = ModelConfig(
    architecture="llama",
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    rope_scaling=Llama3RopeScaling(32.0, 1.0, 4.0, 8192),
    tie_word_embeddings=True,
    rope_theta=500000.0,
    max_position_embeddings=131072,
)
"""Llama-3.2-1B's shape."""

SHAPE_8B = MODELS["Llama-3.1-8B"]

_TINY = ModelConfig(
    architecture="llama",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)


@dataclass(frozen=True)
class Scale:
    """Sizes of what is measured.

    Args:
        small: the model of `serve-1b` and `agents`.
        large: the model of `serve-8b`, and the one whose attention and pages are measured alone.
        dtype: of weights, activations and KV.
        engine_backend: `kernel_backend` of the engines.
        page_size: token slots of a page.
        batch: rows of a decode step.
        alone: whether steps of one row are compiled, and measured, too.
        context: tokens before each row.
        chunk: prefill chunk, in tokens.
        window: tokens a row in one decode window.
        pages: that a handoff moves at once.
        codec_pages: that are compressed.
        agents: models of a session.
        sessions: at once.
        turns: rounds of all agents, in each session.
        appended: tokens that each call appends to the context.
        reply: tokens of each answer.
        repeats: of each measurement; medians are reported.
        least_seconds: that one timing lasts.
    """

    small: ModelConfig = SHAPE_1B
    large: ModelConfig = SHAPE_8B
    dtype: str = "bfloat16"
    engine_backend: str = "auto"
    page_size: int = 32
    batch: int = 32
    alone: bool = True
    context: int = 4096
    chunk: int = 512
    window: int = 64
    pages: int = 64
    codec_pages: int = 16
    agents: int = 4
    sessions: int = 8
    turns: int = 2
    appended: int = 64
    reply: int = 32
    repeats: int = 5
    least_seconds: float = 0.05


FULL = Scale()

TINY = Scale(
    small=_TINY,
    large=_TINY,
    dtype="float32",
    engine_backend="xla",  # which has a kernel for shared prefixes on CPUs too
    page_size=8,
    batch=4,
    alone=False,
    context=64,
    chunk=32,
    window=8,
    pages=4,
    codec_pages=2,
    agents=2,
    sessions=4,
    turns=1,
    appended=8,
    reply=4,
    repeats=2,
    least_seconds=0.0,
)
