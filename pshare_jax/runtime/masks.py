"""Which tokens the rows of a step may get: host state of sequences whose choice is restricted.

What a row may get next depends on its last token, so masks are made between a step's logits and
the choice of its tokens, while the device computes the logits. Where a grammar leaves one text
only, its tokens are known without a step: they are forced, in the tokenizer's own spelling, so
that what a sequence gets does not depend on how many steps were saved.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import numpy as np
from llguidance import LLExecutor
from numpy.typing import NDArray

from pshare_jax.core.constraints import Thoughts
from pshare_jax.core.plans import Admit
from pshare_jax.errors import PshareError
from pshare_jax.text.grammar import GrammarCompiler, GrammarState

Mask = NDArray[np.uint32]
"""`[words]` or `[rows, words]`; bit i % 32 of word i // 32 says whether token i may come."""

_ALL = np.uint32(0xFFFFFFFF)

LEAST_JUMP = 4
"""Forced tokens from which on they are computed in one chunk instead of a step each: a chunk reads
all weights too."""


def mask_words(vocab_size: int) -> int:
    """Words of a mask over so many token ids."""
    return -(-vocab_size // 32)


class RowMask:
    """What one sequence may get next.

    Args:
        admit: the sequence; its known tokens are taken in.
        grammar: the start of the answer, if there is a grammar.
        vocab_size: number of token ids.
        end_ids: tokens that end a text, the usual one first.

    Attributes:
        tokens: all that are known.
        error: why it cannot go on.
    """

    def __init__(
        self,
        admit: Admit,
        grammar: GrammarState | None,
        vocab_size: int,
        end_ids: Sequence[int],
    ):
        params = admit.params
        self.tokens = list(admit.tokens[: admit.prompt_len])
        self.error: str | None = None
        self._admit = admit
        self._grammar = grammar
        self._end_ids = tuple(end_ids)
        self._thoughts: Thoughts | None = params.thoughts if grammar is not None else None
        self._thinking = self._thoughts is not None and self._thoughts.begun
        self._forces = grammar is not None and not (
            params.allowed_token_ids or params.bad_words or params.min_tokens
        )
        self._pending: list[int] = []
        self._over = False
        self._vocab_size = vocab_size
        self._allowed: Mask | None = None
        if params.allowed_token_ids:
            self._allowed = ~_without(vocab_size, params.allowed_token_ids)
        self._look_ahead()
        for token_id in admit.tokens[admit.prompt_len :]:
            self.accept(token_id)

    @property
    def active(self) -> bool:
        """Whether anything is left out now."""
        params = self._admit.params
        limited = bool(params.allowed_token_ids or params.bad_words)
        return self._grammar is not None or limited or self._num_output < params.min_tokens

    @property
    def jump(self) -> list[int]:
        """Tokens that must follow, as many as there may be, if they are worth a chunk."""
        params = self._admit.params
        forced = self._pending[: params.max_tokens - self._num_output]
        worthwhile = len(forced) >= LEAST_JUMP and params.logprobs is None
        return forced if worthwhile and not self._over else []

    @property
    def matcher(self) -> GrammarState | None:
        """The grammar, if it has to be asked for the next mask."""
        asked = not (self._over or self._thinking or self._pending or self.error)
        return self._grammar if asked else None

    def accept(self, token_id: int) -> None:
        """Goes on by a token. One that the grammar forbids is an error of the row."""
        self.tokens.append(token_id)
        if self._over or self.error is not None:
            return
        if token_id in self._admit.end_token_ids and not self._thinking:
            self._over = True
        elif self._thoughts is not None and self._is_thought(token_id, self._thoughts):
            self._look_ahead()
        elif self._grammar is not None:
            self._thoughts = None
            try:
                self._grammar.accept(token_id)
            except PshareError as error:
                self.error = str(error)
            self._pending = self._pending[1:] if self._pending[:1] == [token_id] else []
            self._look_ahead()

    def finish(self, mask: Mask) -> None:
        """Completes this row of a batch's mask.

        Args:
            mask: `[words]`; the grammar's, if `matcher` gives one, else every token.
        """
        params = self._admit.params
        if self._over or self.error is not None:
            return
        if self._pending:
            mask[:] = ~_without(self._vocab_size, self._pending[:1])
            return
        if self._grammar is not None and not self._thinking and self._ends(mask):
            # The grammar knows the base's end tokens; a module may end with its own.
            _set(mask, *self._admit.end_token_ids)
        if self._thinking:
            # The answer is still to come.
            mask &= _without(self._vocab_size, (*self._end_ids, *self._admit.end_token_ids))
        elif self._thoughts is not None:
            _set(mask, self._thoughts.opening)
        if self._allowed is not None:
            self._narrow(mask, self._allowed)
        if self._num_output < params.min_tokens:
            self._narrow(mask, _without(self._vocab_size, self._admit.end_token_ids))
        if params.bad_words:
            self._narrow(mask, _without(self._vocab_size, self._bad_next()))

    @property
    def _num_output(self) -> int:
        return len(self.tokens) - self._admit.prompt_len

    def _is_thought(self, token_id: int, thoughts: Thoughts) -> bool:
        """Whether a token belongs to the thoughts; the first one may begin or omit them."""
        if not self._thinking:
            self._thinking = token_id == thoughts.opening
            return self._thinking
        if token_id == thoughts.closing:
            self._thinking, self._thoughts = False, None
        return True

    def _look_ahead(self) -> None:
        """Finds what must follow, once what had to has come."""
        if self._grammar is None or self._thoughts is not None or self._pending or self.error:
            return
        if self._grammar.finished:
            self._pending = list(self._end_ids[:1])
        elif self._forces:
            self._pending = list(self._grammar.forced())

    def _ends(self, mask: Mask) -> bool:
        return any(mask[i // 32] >> np.uint32(i % 32) & np.uint32(1) for i in self._end_ids)

    def _narrow(self, mask: Mask, allowed: Mask) -> None:
        if (mask & allowed).any():
            mask &= allowed

    def _bad_next(self) -> list[int]:
        output = self.tokens[self._admit.prompt_len :]
        return [
            word[-1]
            for word in self._admit.params.bad_words
            if len(word) == 1 or tuple(output[1 - len(word) :]) == word[:-1]
        ]


class Masks:
    """Makes the rows' states, and the masks of steps.

    Args:
        vocab_size: number of token ids of the model.
        compiler: of grammars; without one no request may have any.
    """

    def __init__(self, vocab_size: int, compiler: GrammarCompiler | None = None):
        self._vocab_size = vocab_size
        self._compiler = compiler
        self._threads: LLExecutor | None = None

    def admit(self, admit: Admit) -> RowMask | None:
        """The state of a sequence that gets a slot; None where nothing is ever left out."""
        if not admit.params.masked:
            return None
        grammar, error, end_ids = None, None, tuple(sorted(admit.end_token_ids))
        spec = admit.params.grammar
        if spec is not None:
            if self._compiler is None:
                raise PshareError("a grammar needs a tokenizer")
            end_ids = self._compiler.end_ids
            try:
                grammar = self._compiler.compile(spec, "grammar")
            except PshareError as failure:
                error = str(failure)
        row = RowMask(admit, grammar, self._vocab_size, end_ids)
        row.error = error or row.error
        return row

    def fill(self, rows: Sequence[RowMask | None], batch: int) -> Mask:
        """The mask of a step, `[batch, words]`; all tokens for rows without a state, and padding.

        A grammar that becomes too complex is an error of its row.
        """
        mask = np.full((batch, mask_words(self._vocab_size)), _ALL, np.uint32)
        states = [(row, row.matcher, i) for i, row in enumerate(rows) if row is not None]
        asked = [(row, state, i) for row, state, i in states if state is not None]
        if asked:
            if self._threads is None:
                self._threads = LLExecutor(max(1, (os.cpu_count() or 1) // 2))
            errors = GrammarState.fill_all(
                self._threads, [(state, i) for _, state, i in asked], mask
            )
            for (row, _, i), error in zip(asked, errors, strict=True):
                if error is not None:
                    row.error, mask[i] = error, _ALL
        for row, _, i in states:
            row.finish(mask[i])
        return mask


def only(vocab_size: int, token_id: int) -> Mask:
    """A mask that leaves one token."""
    return ~_without(vocab_size, (token_id,))


def _without(vocab_size: int, ids: Iterable[int]) -> Mask:
    mask = np.full(mask_words(vocab_size), _ALL, np.uint32)
    which = np.asarray(list(ids), np.int64)
    np.bitwise_and.at(mask, which // 32, ~(np.uint32(1) << (which % 32).astype(np.uint32)))
    return mask


def _set(mask: Mask, *token_ids: int) -> None:
    for token_id in token_ids:
        mask[token_id // 32] |= np.uint32(1) << np.uint32(token_id % 32)
