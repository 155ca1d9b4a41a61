"""Restrictions of tokens: checked and compiled beside the event loop, before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pshare_jax.core.requests import SamplingParams
from pshare_jax.errors import RequestError
from pshare_jax.frontend.constraints import AskedGrammar
from pshare_jax.frontend.requests import GenerationRequest
from pshare_jax.serve.service import Service
from pshare_jax.text.bad_words import bad_word_ids

_INLINE_CHARS = 2048
"""Words of so many characters are tokenised in milliseconds."""


async def restricted(
    service: Service,
    sampling: Sequence[SamplingParams],
    body: GenerationRequest,
    grammar: AskedGrammar | None,
) -> list[SamplingParams]:
    """`sampling` with what `body` says of grammars and words.

    Args:
        service: whose engine compiles.
        sampling: of each prompt, with its `max_tokens`.
        body: the request.
        grammar: what `frontend.constraints` found in it.

    Raises:
        RequestError: what cannot be served; names the field.
    """
    for each in sampling:
        if each.min_tokens > each.max_tokens:
            raise RequestError(
                f"min_tokens ({each.min_tokens}) must not exceed max_tokens ({each.max_tokens})",
                param="min_tokens",
            )
    given = body.bad_words or ()
    words = await service.offload.run_if(
        sum(map(len, given)) > _INLINE_CHARS,
        bad_word_ids,
        given,
        lambda text: service.tokenizer.encode(text, False),
    )
    if grammar is not None:
        await _compile(service, grammar)
    spec = None if grammar is None else grammar.spec
    return [msgspec.structs.replace(each, bad_words=words, grammar=spec) for each in sampling]


async def _compile(service: Service, grammar: AskedGrammar) -> None:
    compiler = service.engine.grammars
    if compiler is None:
        raise RequestError("grammars need a tokenizer with an end token", param=grammar.param)
    if not compiler.has(grammar.spec):
        await service.offload.compile(compiler.compile, grammar.spec, grammar.param)
