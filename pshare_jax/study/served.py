"""What a module answers as it is served: by the engine, as `ServeConfig` has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pshare_jax.config import DecodeConfig, DType, ModelEntry, PrefillConfig, ServeConfig
from pshare_jax.engine.offline import Engine

_BATCH = 32
_CHUNK = 512


def served_texts(
    base: str,
    entry: ModelEntry,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    dtype: DType,
    report: Callable[[int], None],
) -> list[str]:
    """Greedy answers, without special tokens.

    Args:
        base: the prefill checkpoint folder.
        entry: the model that answers.
        prompts: token ids.
        max_tokens: most tokens of an answer.
        dtype: of weights, activations and KV; not `auto`, which differs between machines.
        report: gets the number of prompts done, now and then.

    Raises:
        CheckpointError, CertificateError, ConfigError: the model cannot be served so.
    """
    longest = max(map(len, prompts)) + max_tokens
    pages = -(-longest // ServeConfig.page_size) + 1
    config = ServeConfig(
        base,
        [entry],
        dtype,
        max_model_len=longest,
        # On one device, as training is.
        connector="same-mesh",
        # Replies have no next call.
        reply_kv="off",
        prefill=PrefillConfig(chunk_buckets=[_CHUNK]),
        decode=DecodeConfig(
            num_pages=_BATCH * pages + 1, batch_buckets=[_BATCH], max_num_seqs=_BATCH
        ),
    )
    with Engine.from_config(config) as engine:
        completions = engine.generate(
            entry.name,
            list(prompts),
            max_tokens=max_tokens,
            on_completion=lambda index, completion: report(1),
        )
    return [completion.text for completion in completions]
