"""`verify A B`: how far two models are apart: logits on sample prompts, tokens, templates.

A Hugging Face folder is read by `second_reader`, so that what the import gets wrong is found. Both
models are read layer by layer. `referee` has others read one of them: transformers, llama.cpp.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.special

from pshare_jax.convert.files import one_line, write_files
from pshare_jax.convert.inspection import check_hashes
from pshare_jax.convert.manifest import MANIFEST_FILE
from pshare_jax.convert.orbax import open_weights, read_tokenizer_files
from pshare_jax.convert.referee import Reading, Referee, read
from pshare_jax.convert.second_reader import read_folder
from pshare_jax.convert.sources import open_source
from pshare_jax.convert.streamed import Head, hidden_states
from pshare_jax.convert.tensors import DTYPES, LazyTensor
from pshare_jax.errors import CertificateError, CheckpointError, RequestError
from pshare_jax.models.config import ModelConfig, WeightFormat
from pshare_jax.models.lora import merge
from pshare_jax.models.split import Certificate
from pshare_jax.text.tokenizer import Tokenizer

SAMPLE_PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Question: A train covers 120 km in 1.5 hours. How fast does it go?\nAnswer:",
    '{"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}',
    "Il était une fois, dans un petit village, 一只猫 🐈 and a dog.",
)

MESSAGES = ({"role": "user", "content": "How warm is it in Zürich?"},)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}

STATEMENTS = ("architecture", "max_position_embeddings", "tie_word_embeddings")
"""Fields of a configuration that the logits do not depend on beyond what they show."""

POSITIONS = 128
"""Positions whose logits are in memory at once."""

MAX_TOKENS = 512
"""Longer prompts are cut: the comparison needs many positions, not long ones."""


@dataclass(frozen=True)
class Model:
    """A full model whose weights are read when they are needed, as what they stand for.

    `weights` is the form in which a checkpoint has them.
    """

    config: ModelConfig
    tensors: Mapping[str, LazyTensor]
    tokenizer_files: Mapping[str, bytes]
    weights: WeightFormat = "plain"


@dataclass(frozen=True)
class Difference:
    """Between two models, over all positions of all prompts.

    Args:
        largest: largest absolute difference of a logit.
        mean_kl: mean over positions of KL(A || B) of the next-token distributions, in nats.
        positions: number of positions compared.
        same_best: at how many of them both give the same token the highest logit.
        others: what else differs, a sentence each: configuration, tokens, templates, end tokens.
    """

    largest: float
    mean_kl: float
    positions: int
    same_best: int
    others: tuple[str, ...] = ()


def load_model(
    path: str | Path, base: str | Path | None = None, *, long_context: bool = False
) -> Model:
    """Opens a checkpoint, or anything that can be imported.

    Args:
        path: what to open; the hashes of a checkpoint are checked.
        base: the prefill checkpoint of a decode module; a LoRA module is merged into it.
        long_context: see `open_source`; of what is no checkpoint.

    Raises:
        CheckpointError: it cannot be read, or is a LoRA module without `base`.
        CertificateError: `base` is not its base.
    """
    if not (Path(path) / MANIFEST_FILE).is_file():
        is_folder = Path(path).is_dir()
        # The import's own reader says best what is wrong with a folder.
        source = open_source(path, tokenizer=not is_folder, long_context=long_context)
        source = read_folder(Path(path), long_context) if is_folder else source
        return Model(source.config, source.tensors, source.tokenizer_files)
    manifest = check_hashes(path)
    tensors = open_weights(manifest)
    if manifest.certificate is None:
        return Model(manifest.config, tensors, read_tokenizer_files(manifest), manifest.weights)
    files: Mapping[str, bytes] = {}
    if base is not None:
        prefill = check_hashes(base)
        if prefill.fingerprint != prefill.current(manifest.certificate.prefill_fingerprint):
            raise CertificateError(f"{base}: is not the base that {path} was made for")
        files = read_tokenizer_files(prefill)
    if manifest.certificate.kind == "lora":
        if base is None:
            raise CheckpointError(f"{path}: is a LoRA module; name its base with --base")
        tensors = _merged(open_weights(base), tensors, manifest.certificate)
    return Model(manifest.config, tensors, files, manifest.weights)


def _merged(
    base: Mapping[str, LazyTensor], factors: Mapping[str, LazyTensor], certificate: Certificate
) -> dict[str, LazyTensor]:
    """The base's tensors with the updates of a LoRA module, each merged when it is read."""
    merged = dict(base)
    for name, a in factors.items():
        path, _, factor = name.rpartition(".")
        if factor == "lora_a":
            pair = {name: a, f"{path}.lora_b": factors[f"{path}.lora_b"]}
            kernel = f"{path}.kernel"
            read = functools.partial(_merged_kernel, kernel, base[kernel], pair, certificate)
            merged[kernel] = LazyTensor(base[kernel].shape, DTYPES["float32"], read)
    return merged


def _merged_kernel(
    name: str, kernel: LazyTensor, pair: Mapping[str, LazyTensor], certificate: Certificate
) -> np.ndarray:
    module = certificate.lora_module({key: tensor.read() for key, tensor in pair.items()})
    wide = kernel.astype(DTYPES["float32"]).read()
    return np.asarray(merge({name: wide}, module)[name])


def read_prompts(path: str | Path) -> list[str]:
    """One prompt a line; empty lines do not count.

    Raises:
        CheckpointError: no such file, not UTF-8, or no prompts.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {one_line(error)}") from error
    if not (prompts := [line for line in lines if line.strip()]):
        raise CheckpointError(f"{path}: has no prompts")
    return prompts


def compare(a: Model, b: Model, prompts: Sequence[str] = SAMPLE_PROMPTS) -> Difference:
    """Compares the logits of `a` and `b` at every position of `prompts`.

    Raises:
        CheckpointError: vocabularies of different size, no tokenizer in either, or no tokens.
    """
    tokenizer = _tokenizer(a.tokenizer_files or b.tokenizer_files)
    encoded = _encoded(tokenizer, prompts)
    others = (*_other_config(a, b), *_other_text(a, b, prompts))
    sizes = a.config.vocab_size, b.config.vocab_size
    return _difference(_logits(a, encoded), _logits(b, encoded), sizes, others)


def compare_with(
    model: Model, referee: Referee, prompts: Sequence[str] = SAMPLE_PROMPTS
) -> tuple[Difference, str]:
    """Compares `model` with another library's reading of it; gives that library's name, too.

    Raises:
        CheckpointError: as for `compare` and `referee.read`.
    """
    tokenizer = _tokenizer(model.tokenizer_files)
    encoded = _encoded(tokenizer, prompts)
    with read(referee, prompts, encoded, MESSAGES, TOOL) as reading:
        others = tuple(_other_reading(tokenizer, reading, prompts))
        sizes = model.config.vocab_size, reading.logits.shape[1]
        theirs = (
            reading.logits[i : i + POSITIONS] for i in range(0, len(reading.logits), POSITIONS)
        )
        return _difference(_logits(model, encoded), theirs, sizes, others), reading.library


def _encoded(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    encoded = [tokens for p in prompts if (tokens := tokenizer.encode(p)[:MAX_TOKENS])]
    if not encoded:
        raise CheckpointError("the prompts have no tokens")
    return encoded


def _logits(model: Model, encoded: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
    """`[up to POSITIONS, vocab]` float32, of all positions of all prompts in order."""
    states = hidden_states(model.config, model.tensors, encoded)
    head = Head(model.config, model.tensors)
    for i in range(0, len(states), POSITIONS):
        yield head.logits(states[i : i + POSITIONS])


def _difference(
    a: Iterator[np.ndarray],
    b: Iterator[np.ndarray],
    sizes: tuple[int, int],
    others: tuple[str, ...],
) -> Difference:
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"vocabularies of {sizes[0]} and {sizes[1]} tokens: the logits cannot be compared"
        )
    largest, kl, positions, same_best = 0.0, 0.0, 0, 0
    for x, y in zip(a, b, strict=True):
        # numpy's maximum keeps a NaN, Python's max would lose it.
        largest = float(np.maximum(largest, np.max(np.abs(x - y))))
        kl += sum(map(_divergence, x, y))
        same_best += int(np.sum(x.argmax(axis=-1) == y.argmax(axis=-1)))
        positions += len(x)
    return Difference(largest, kl / max(positions, 1), positions, same_best, others)


def _other_config(a: Model, b: Model) -> list[str]:
    """Differences that the prompts may be too short to show, a window of attention for one."""
    return [
        f"{name} is {value!r} and {getattr(b.config, name)!r}"
        for name, value in vars(a.config).items()
        if name not in STATEMENTS and value != getattr(b.config, name)
    ]


def _other_text(a: Model, b: Model, prompts: Sequence[str]) -> list[str]:
    """Differences of tokenizer, chat template and end tokens, where both models have them."""
    if not a.tokenizer_files or not b.tokenizer_files:
        return []
    x, y = _tokenizer(a.tokenizer_files), _tokenizer(b.tokenizer_files)
    found = []
    for prompt in prompts:
        if (ids := x.encode(prompt)) != (other := y.encode(prompt)):
            found.append(f"the tokens of {prompt[:20]!r} are {ids[:5]}... and {other[:5]}...")
            break
    for tools in (None, [TOOL]):
        if _rendered(x, tools) != _rendered(y, tools):
            how = "with" if tools else "without"
            found.append(f"the chat template gives another text {how} tools")
    if set(x.eos_token_ids) != set(y.eos_token_ids):
        found.append(f"the end tokens are {x.eos_token_ids} and {y.eos_token_ids}")
    return found


def _other_reading(tokenizer: Tokenizer, reading: Reading, prompts: Sequence[str]) -> Iterator[str]:
    """Differences of tokens, chat template and end tokens from what a referee says of them."""
    for prompt, theirs in zip(prompts, reading.tokens, strict=True):
        if (ids := tokenizer.encode(prompt)) != theirs:
            yield f"the tokens of {prompt[:20]!r} are {ids[:5]}... and {theirs[:5]}..."
            break
    for tools, theirs in zip((None, [TOOL]), reading.rendered or (), strict=False):
        if _rendered(tokenizer, tools) != theirs:
            yield f"the chat template gives another text {'with' if tools else 'without'} tools"
    ends = reading.end_tokens
    if ends is not None and set(ends) != set(tokenizer.eos_token_ids):
        yield f"the end tokens are {tokenizer.eos_token_ids} and {tuple(ends)}"


def _rendered(tokenizer: Tokenizer, tools: list[dict] | None) -> str | None:
    """A conversation in the chat template; None where there is none, or it refuses."""
    try:
        return tokenizer.apply_chat_template(MESSAGES, tools)
    except RequestError:
        return None


def _tokenizer(files: Mapping[str, bytes]) -> Tokenizer:
    if not files:
        raise CheckpointError("neither model has a tokenizer; name the base with --base")
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), files)
        return Tokenizer.load(folder)


def _divergence(a: np.ndarray, b: np.ndarray) -> float:
    """KL(a || b) in nats of two logit vectors; float32 would round small ones below zero."""
    log_a, log_b = (x - scipy.special.logsumexp(x) for x in (a.astype(float), b.astype(float)))
    return float(np.sum(np.exp(log_a) * (log_a - log_b)))
