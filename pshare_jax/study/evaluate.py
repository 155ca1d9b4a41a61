"""Evaluation of a trained decode module: by the trainer's own decoding, at any split of a prompt,
and as it is served."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pshare_jax.config import DType, ModelEntry, Sharing
from pshare_jax.convert.manifest import TOKENIZER_FOLDER, read_manifest
from pshare_jax.convert.orbax import load_weights
from pshare_jax.core.split_rule import LAST_TOKEN, Invocation, TailSetting
from pshare_jax.errors import ConfigError
from pshare_jax.evals.grading import grade
from pshare_jax.evals.intervals import bootstrap_interval
from pshare_jax.evals.items import Item
from pshare_jax.frontend.chat import TemplateOptions, chat_messages, chat_prompt
from pshare_jax.frontend.model_format import tool_prompt
from pshare_jax.frontend.params import Limits
from pshare_jax.frontend.tool_prompt import ToolPrompt
from pshare_jax.models.split import check_certificate
from pshare_jax.study.recompute import recomputed_kv
from pshare_jax.study.served import served_texts
from pshare_jax.study.tasks import TOOL_PARSER, plain_question
from pshare_jax.text.openings import split_rule
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.train.buckets import choose_buckets
from pshare_jax.train.config import KVCacheConfig
from pshare_jax.train.generate import Prompt, generate, prompt_kv
from pshare_jax.train.kv_store import KVStore, open_store, store_key
from pshare_jax.train.layout import prompt_row
from pshare_jax.train.loss import LoraShape, Recipe

_DTYPE = "float32"
_BUCKETS = 6

Cover = Callable[[Sequence[int]], int]
"""From a prompt (token ids) to how many of its tokens the base covers."""


@dataclass(frozen=True)
class Answers:
    """What a module answered: for each item the text, and whether it is right.

    Args:
        texts: of each item.
        correct: of each item.
        prompt_tokens: of all items.
        saved: the share, 0 to 1, of the prompts' prefill that the module did not compute itself:
            tokens times layers.
    """

    texts: list[str]
    correct: list[bool]
    prompt_tokens: int
    saved: float

    def as_json(self) -> dict[str, Any]:
        """A JSON object; which items were right is kept as a string of 0s and 1s."""
        return {
            "accuracy": sum(self.correct) / len(self.correct),
            "interval": bootstrap_interval(self.correct),
            "correct": "".join(str(int(right)) for right in self.correct),
            "first_answers": self.texts[:5],
            "prompt_tokens": self.prompt_tokens,
            "saved": self.saved,
        }


class Evaluator:
    """A decode module beside its base, ready to answer.

    Args:
        base: the prefill checkpoint folder.
        module: the decode module's folder; None: the base's own weights.
        batch_size: prompts that are answered together.
        kv_cache: where the base's KV of the prompts is kept for later evaluations on them.
        plain_text: whether questions are plain texts.

    Raises:
        CheckpointError: one of them cannot be read, or they do not belong together.
    """

    def __init__(
        self,
        base: str | Path,
        module: str | Path | None,
        batch_size: int,
        kv_cache: KVCacheConfig,
        plain_text: bool = False,
    ):
        manifest = read_manifest(base)
        self._folders = (base, module)
        self._base = load_weights(manifest, dtype=jnp.float32)
        self._weights = self._base
        self._batch_size = batch_size
        self._kv_cache = kv_cache
        self._plain_text = plain_text
        self._fingerprint = manifest.fingerprint
        lora = None
        if module is not None:
            own = read_manifest(module)
            self._weights = load_weights(own, dtype=jnp.float32)
            certificate = own.certificate
            assert certificate is not None
            # Not `shared` but for what must be: what naive sharing costs is measured too.
            sharing = "shared" if isinstance(certificate.tail, Invocation) else "isolated"
            check_certificate(
                certificate, manifest.fingerprint, sharing, str(module), manifest.former
            )
            if certificate.lora_targets is not None:
                assert certificate.lora_rank is not None
                assert certificate.lora_alpha is not None
                lora = LoraShape(
                    certificate.lora_rank, certificate.lora_alpha, certificate.lora_targets
                )
        self._recipe = Recipe(manifest.config, _DTYPE, lora)
        self._tokenizer = Tokenizer.load(manifest.folder / TOKENIZER_FOLDER)
        self._tool_prompt: ToolPrompt = tool_prompt(TOOL_PARSER, self._tokenizer.chat_template)

    def answer(
        self,
        items: Sequence[Item],
        cover: Cover,
        max_tokens: int,
        report: Callable[[int], None],
        layers: tuple[int, int] | None = None,
    ) -> Answers:
        """Answers `items` greedily.

        Args:
            items: see `pshare_jax.evals`.
            cover: how much of a prompt the base covers.
            max_tokens: most tokens of an answer.
            report: gets the number of items done, now and then.
            layers: first and end of those in which the module computes the covered KV itself.
        """
        tokens = [self._prompt(item) for item in items]
        prompts = [Prompt(prompt, cover(prompt)) for prompt in tokens]
        covered = sum(prompt.cover for prompt in prompts)
        outputs = generate(
            self._recipe,
            self._weights,
            self._base,
            prompts,
            max_tokens=max_tokens,
            end_token_ids=self._tokenizer.eos_token_ids,
            batch_size=self._batch_size,
            store=self._store(tokens) if covered and layers is None else None,
            make_kv=None if layers is None else self._recompute(layers),
            report=report,
        )
        texts = [self._tokenizer.decode(tokens) for tokens in outputs]
        own = 0.0 if layers is None else (layers[1] - layers[0]) / self._recipe.config.num_layers
        return _graded(items, texts, tokens, covered * (1 - own))

    def answer_as_served(
        self,
        items: Sequence[Item],
        tail: TailSetting | None,
        max_tokens: int,
        dtype: DType,
        report: Callable[[int], None],
    ) -> Answers:
        """As `answer`, by the server's engine; of a decode module.

        Args:
            items: see `pshare_jax.evals`.
            tail: the module's; None: it is served isolated.
            max_tokens: most tokens of an answer.
            dtype: that it is served in.
            report: gets the number of items done, now and then.
        """
        base, module = self._folders
        sharing: Sharing = "isolated" if tail is None else "shared"
        entry = ModelEntry("evaluated", str(module), sharing)
        prompts = [self._prompt(item) for item in items]
        texts = served_texts(str(base), entry, prompts, max_tokens, dtype, report)
        cover = cover_share(0.0) if tail is None else self.cover_by(tail)
        return _graded(items, texts, prompts, sum(map(cover, prompts)))

    def cover_by(self, tail: TailSetting) -> Cover:
        """As a module of that `tail` is served."""
        rule = split_rule(tail, lambda: self._tokenizer)
        return lambda prompt: rule.split(prompt).covered

    def _recompute(self, layers: tuple[int, int]) -> Callable[[np.ndarray], jax.Array]:
        count = self._recipe.config.num_layers
        if layers[1] > count:
            raise ConfigError(f"runs: recompute names layer {layers[1]}, but there are {count}")
        return lambda prompt: recomputed_kv(
            self._recipe, layers, self._weights, self._base, jnp.asarray(prompt)
        )

    def _store(self, prompts: Sequence[list[int]]) -> KVStore | None:
        """The base's KV of all but the last token of each prompt; None when it is not kept."""
        if not self._kv_cache.keep:
            return None
        rows = [prompt_row(tokens) for tokens in prompts]
        buckets, assigned = choose_buckets(rows, _BUCKETS)
        size = self._batch_size
        key = store_key(self._fingerprint, _DTYPE, rows, buckets, size)
        folder = Path(self._kv_cache.folder)
        store, _ = open_store(self._recipe.config, rows, _DTYPE, self._kv_cache, folder, key)
        if store is not None:
            store.fill(
                np.arange(len(rows)),
                buckets,
                assigned,
                size,
                lambda prompt: np.asarray(prompt_kv(self._recipe, self._base, prompt)),
                lambda count: None,
            )
        return store

    def _prompt(self, item: Item) -> list[int]:
        if self._plain_text:
            return self._tokenizer.encode(plain_question(item.messages))
        options = TemplateOptions(tool_prompt=self._tool_prompt)
        limits = Limits(self._tokenizer.vocab_size, self._recipe.config.max_position_embeddings)
        messages = chat_messages(item.messages)
        return list(chat_prompt(self._tokenizer, limits, messages, item.tools, options).token_ids)


def _graded(
    items: Sequence[Item], texts: list[str], prompts: Sequence[Sequence[int]], covered: float
) -> Answers:
    correct = [grade(item, text).correct for item, text in zip(items, texts, strict=True)]
    total = sum(map(len, prompts))
    return Answers(texts, correct, total, covered / total)


def cover_share(share: float) -> Cover:
    """The base covers that share of a prompt, rounded down; never its last token."""
    return lambda prompt: min(int(share * len(prompt)), LAST_TOKEN.split(prompt).covered)
