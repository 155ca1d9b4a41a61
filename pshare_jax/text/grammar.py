"""Which tokens may come next, for an answer that has to follow a grammar.

Grammars are compiled by llguidance (https://github.com/guidance-ai/llguidance), on the host. It
builds its automata while it is asked for masks, so to compile is cheap and a mask takes tens of
microseconds; both let other threads run.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.numpy import fill_next_token_bitmask_par
from numpy.typing import NDArray

from pshare_jax.core.constraints import GrammarSpec
from pshare_jax.errors import PshareError, QueueFullError, RequestError
from pshare_jax.text.grammar_trial import NoThreadError, Trial, Vocabulary, on_a_deep_stack
from pshare_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# Models fall into endless white space where any is allowed: one space, or a new line with its
# indentation, is what JSON is written with.
_WHITESPACE = r"[ ]?|\n[ ]{0,16}"
JSON_OPTIONS: JsonCompileOptions = {
    "whitespace_pattern": _WHITESPACE,
    "item_separator": ",",
    "key_separator": ":",
    # Keywords that are not implemented are errors, never ignored.
    "lenient": False,
    "coerce_one_of": False,
}
"""How JSON is to be written, and read from schemas; llguidance's options."""

_SILENT = 0

_TRIAL_SECONDS = 1.0
"""More processor time than compiling may take, for what a process has to do besides."""


@dataclass(frozen=True)
class GrammarLimits:
    """How much of a grammar is taken.

    Args:
        max_chars: length of its text.
        max_depth: lists and objects within each other in a schema.
        max_nodes: values in a schema, all lists and objects counted.
        max_choices: texts of a choice.
        max_symbols: symbols of the grammar that it becomes.
        max_lexer_states: states of its automaton; each takes one to two KiB.
        compile_fuel: steps of building its automaton's expressions, some 50,000 a millisecond.
        step_fuel: steps of the automaton for one mask, some 1,000 a millisecond at worst.
        compile_seconds: processor time that compiling may take.
    """

    max_chars: int = 65_536
    max_depth: int = 64
    max_nodes: int = 10_000
    max_choices: int = 1_000
    max_symbols: int = 200_000
    max_lexer_states: int = 50_000
    compile_fuel: int = 100_000
    step_fuel: int = 50_000
    compile_seconds: float = 2.0


class GrammarError(PshareError):
    """A token that the grammar forbids, or a grammar that became too complex on the way."""


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps those that were used last.

    May be used from several threads.

    Args:
        tokenizer: the base's tokenizer, which all models share.
        limits: how much of a grammar is taken.
        cache_entries: how many compiled grammars are kept, besides those that are held.
        trial: whether each is compiled in a process of its own first, see `grammar_trial`.

    Attributes:
        end_ids: tokens that end a text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        limits: GrammarLimits | None = None,
        cache_entries: int = 128,
        *,
        trial: bool = False,
    ):
        self.limits = limits or GrammarLimits()
        self._cache_entries = cache_entries
        self.end_ids = tokenizer.eos_token_ids
        self._cache: OrderedDict[GrammarSpec, LLMatcher] = OrderedDict()
        self._held: Counter[GrammarSpec] = Counter()
        self._lock = threading.Lock()
        self._words = -(-tokenizer.vocab_size // 32)
        vocabulary = _Vocabulary(tokenizer)
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(vocabulary), eos_token=list(tokenizer.eos_token_ids)
        )
        parser_limits: dict[str, Any] = {
            "max_grammar_size": self.limits.max_symbols,
            "max_lexer_states": self.limits.max_lexer_states,
            "initial_lexer_fuel": self.limits.compile_fuel,
            "step_lexer_fuel": self.limits.step_fuel,
            "verbose_errors": False,
        }
        self._parser_limits = LLParserLimits(**parser_limits)
        seconds = self.limits.compile_seconds + _TRIAL_SECONDS
        self._trial = Trial(vocabulary, self.end_ids, parser_limits, seconds) if trial else None

    def compile(self, spec: GrammarSpec, param: str) -> GrammarState:
        """The start of an answer that follows `spec`.

        Takes up to `limits.compile_seconds` for a grammar that is not kept.

        Raises:
            RequestError: the grammar is not valid, uses what is not supported (which is named), or
                is too complex; `param` is the field that it came from.
            QueueFullError: there is no thread for it now.
        """
        with self._lock:
            if spec in self._cache:
                self._cache.move_to_end(spec)
                return GrammarState(self._cache[spec].deep_copy(), self._words)
        source = _valid_source(spec, param)
        if self._trial is not None and not self._trial.survives(source):
            raise RequestError(
                f"{param}: the grammar takes too much time or memory to compile",
                param=param,
                code="unsupported_grammar",
            )
        try:
            matcher = on_a_deep_stack(lambda: self._compile(source, param))
        except NoThreadError as error:
            raise QueueFullError(f"no thread to compile a grammar: {error}") from error
        with self._lock:
            self._cache[spec] = matcher
            self._forget()
        return GrammarState(matcher.deep_copy(), self._words)

    def has(self, spec: GrammarSpec) -> bool:
        """Whether `compile` would take no time."""
        return spec in self._cache

    def hold(self, spec: GrammarSpec, param: str) -> None:
        """Keeps `spec` compiled until it is released as often.

        Raises:
            RequestError, QueueFullError: see `compile`; then it is not kept.
        """
        with self._lock:
            self._held[spec] += 1
        try:
            self.compile(spec, param)
        except BaseException:
            self.release(spec)
            raise

    def keep(self, spec: GrammarSpec) -> None:
        """As `hold`, of what has been compiled or is known to fail; takes no time."""
        with self._lock:
            self._held[spec] += 1

    def release(self, spec: GrammarSpec) -> None:
        """Undoes one `hold` or `keep`."""
        with self._lock:
            self._held[spec] -= 1
            if self._held[spec] == 0:
                del self._held[spec]
            self._forget()

    def _forget(self) -> None:
        """Drops the compiled grammars that were used longest ago; under the lock."""
        free = [spec for spec in self._cache if spec not in self._held]
        for spec in free[: max(len(free) - self._cache_entries, 0)]:
            del self._cache[spec]

    @property
    def cached(self) -> int:
        """How many compiled grammars are kept now."""
        return len(self._cache)

    def _compile(self, source: str, param: str) -> LLMatcher:
        # Of this thread: what else the machine does must not refuse a grammar.
        start = time.thread_time()
        matcher = LLMatcher(self._tokenizer, source, log_level=_SILENT, limits=self._parser_limits)
        if not matcher.is_error():
            # The first mask builds what a complex expression needs most of; a text that is forced
            # without end is an error too.
            probe = matcher.deep_copy()
            mask = np.frombuffer(probe.compute_bitmask(), np.uint8)
            if forced := probe.compute_ff_tokens():
                probe.consume_token(forced[0])
            if not probe.is_error() and not mask.any():
                raise RequestError(f"{param}: no text follows this grammar", param=param)
            matcher = matcher if not probe.is_error() else probe
        if matcher.is_error():
            raise RequestError(
                f"{param}: the grammar cannot be used: {_reason(matcher)}",
                param=param,
                code="unsupported_grammar",
            )
        seconds = time.thread_time() - start
        if seconds > self.limits.compile_seconds:
            raise RequestError(
                f"{param}: the grammar took {seconds:.1f} s to compile; at most "
                f"{self.limits.compile_seconds:g} s are given",
                param=param,
                code="unsupported_grammar",
            )
        return matcher


class GrammarState:
    """How far one answer has come in its grammar. Belongs to one thread at a time."""

    def __init__(self, matcher: LLMatcher, words: int):
        self._matcher = matcher
        self._words = words

    @property
    def finished(self) -> bool:
        """Whether nothing but an end token may follow."""
        return self._matcher.is_stopped()

    @property
    def complete(self) -> bool:
        """Whether the answer may end here."""
        return self._matcher.is_accepting()

    def fill(self, mask: NDArray[np.uint32]) -> None:
        """Writes which tokens may come next.

        Args:
            mask: `[words]` uint32, one bit at least for each id of the tokenizer; bit i % 32 of
                word i // 32 is that of token i. Models have ids without tokens: these never may.

        Raises:
            GrammarError: the grammar became too complex.
        """
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self._check()
        # There may be a word too many, of ids that no token has.
        count = min(len(words), len(mask))
        mask[:count] = words[:count]
        mask[count:] = 0

    @staticmethod
    def fill_all(
        threads: LLExecutor,
        states: Sequence[tuple[GrammarState, int]],
        mask: NDArray[np.uint32],
    ) -> list[str | None]:
        """Writes which tokens may come next, for several answers at once.

        Args:
            threads: that do the work; meanwhile other Python threads run.
            states: each with the row of `mask` that it writes.
            mask: `[rows, words]`, see `fill`.

        Returns:
            Why there is no mask, for each state; usually None.
        """
        width = states[0][0]._words
        scratch = np.zeros((len(states), width), np.int32)
        matchers = [(state._matcher, row) for row, (state, _) in enumerate(states)]
        fill_next_token_bitmask_par(threads, matchers, scratch)
        count = min(width, mask.shape[1])
        errors: list[str | None] = []
        for row, (state, target) in enumerate(states):
            mask[target, :count] = scratch[row, :count].view(np.uint32)
            mask[target, count:] = 0
            error = state._matcher.is_error()
            errors.append(_too_complex(state._matcher) if error else None)
        return errors

    def forced(self) -> tuple[int, ...]:
        """Tokens that must come next, because the grammar leaves one text only; often none."""
        if self.finished:
            return ()
        return tuple(self._matcher.compute_ff_tokens())

    def accept(self, *token_ids: int) -> None:
        """Goes on by tokens; an end token must be the last.

        Raises:
            GrammarError: the grammar forbids one of them.
        """
        for token_id in token_ids:
            if not self._matcher.consume_token(token_id):
                raise GrammarError(
                    f"the grammar forbids token {token_id}: {_reason(self._matcher)}"
                )

    def rollback(self, count: int) -> None:
        """Takes the last `count` tokens back.

        Raises:
            GrammarError: there were not so many.
        """
        if count and not self._matcher.rollback(count):
            raise GrammarError(f"{count} tokens cannot be taken back: {_reason(self._matcher)}")

    def copy(self) -> GrammarState:
        """Another answer that has come as far."""
        return GrammarState(self._matcher.deep_copy(), self._words)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(_too_complex(self._matcher))


def _too_complex(matcher: LLMatcher) -> str:
    return f"the grammar became too complex: {_reason(matcher)}"


class _Vocabulary(Vocabulary):
    """The tokenizer as llguidance wants it: what each token stands for, by this package's table."""

    def __init__(self, tokenizer: Tokenizer):
        if not tokenizer.eos_token_ids:
            raise PshareError("a grammar needs a tokenizer with an end token")
        self._tokenizer = tokenizer
        ids = range(tokenizer.vocab_size)
        special = tokenizer.special_ids | {*tokenizer.eos_token_ids}
        super().__init__(
            [tokenizer.token_bytes(token_id) for token_id in ids],
            tokenizer.eos_token_ids[0],
            sorted(special),
        )

    def __call__(self, text: str | bytes) -> list[int]:
        """Token ids of `text`: the tokenizer's, if they stand for it, else the longest ones.

        SentencePiece writes a space before a text, which would not be the text that is forced.
        """
        data = text if isinstance(text, bytes) else text.encode()
        ids = self._tokenizer.encode(data.decode(errors="replace"), add_special_tokens=False)
        if b"".join(self.tokens[token_id] for token_id in ids) == data:
            return ids
        return super().__call__(data)


def _valid_source(spec: GrammarSpec, param: str) -> str:
    """`_source`, or RequestError for what llguidance does not read at all."""
    try:
        return _source(spec)
    except ValueError as error:
        raise RequestError(
            f"{param}: the grammar cannot be used: {error}", param=param, code="unsupported_grammar"
        ) from error


def _source(spec: GrammarSpec) -> str:
    match spec.kind:
        case "json_object":
            return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=JSON_OPTIONS)
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(spec.source, overrides=JSON_OPTIONS)
        case "regex":
            return LLMatcher.grammar_from_regex(spec.source)
        case "choice":
            texts = json.loads(spec.source)
            choices = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
            return LLMatcher.grammar_from_lark(f"start: {choices}")
        case "lark":
            return LLMatcher.grammar_from_lark(spec.source)


def _reason(matcher: LLMatcher) -> str:
    """The matcher's message, without the dump of its state that follows."""
    text = matcher.get_error().partition("<")[0].strip()
    return " ".join(text.split())[:500] or "it has ended"
