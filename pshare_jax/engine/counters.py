"""The engine's counters: written by its threads, read as a snapshot. No jax here."""

from __future__ import annotations

import threading
from collections import Counter

from pshare_jax.engine.request import FinishReason, PromptUsage
from pshare_jax.engine.stats import PageRead, TokenSource


class Counters:
    """Thread-safe counters, keyed by model name."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.prefill_tokens: Counter[tuple[str, TokenSource]] = Counter()
        self.prompt_tokens: Counter[str] = Counter()
        self.generation_tokens: Counter[str] = Counter()
        self.handoff_bytes: Counter[str] = Counter()
        self.handoff_pages: Counter[str] = Counter()
        self.preemptions: Counter[str] = Counter()
        self.decode_pages: Counter[tuple[str, PageRead]] = Counter()
        self.finished: Counter[tuple[str, FinishReason]] = Counter()

    def prefilled(self, model: str, usage: PromptUsage) -> None:
        """A prompt's KV is complete in a prefill pool."""
        with self.lock:
            own = usage.cached_tokens - usage.shared_tokens
            self.prefill_tokens[model, "computed"] += usage.computed_tokens
            self.prefill_tokens[model, "same_model"] += own
            self.prefill_tokens[model, "other_model"] += usage.shared_tokens

    def handed_over(self, model: str, pages: int, num_bytes: int) -> None:
        """Pages were moved to a decode pool."""
        with self.lock:
            self.handoff_pages[model] += pages
            self.handoff_bytes[model] += num_bytes

    def generated(self, model: str, tokens: int) -> None:
        """Tokens were generated."""
        with self.lock:
            self.generation_tokens[model] += tokens

    def attended(self, engine: str, plain_pages: int, saved_pages: int) -> None:
        """A dispatch of an engine that shares runs: pages to be read row by row, and saved."""
        with self.lock:
            self.decode_pages[engine, "read"] += plain_pages - saved_pages
            self.decode_pages[engine, "saved"] += saved_pages

    def preempted(self, model: str) -> None:
        """A sequence lost its decode pages and goes back to prefill."""
        with self.lock:
            self.preemptions[model] += 1

    def ended(self, model: str, reason: FinishReason, prompt_tokens: int) -> None:
        """A sequence is finished."""
        with self.lock:
            self.finished[model, reason] += 1
            self.prompt_tokens[model] += prompt_tokens
