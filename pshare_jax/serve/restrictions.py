"""Restrictions of tokens: checked and compiled beside the event loop, before anything is sent."""

from __future__ import annotations

import msgspec

from pshare_jax.core.requests import SamplingParams
from pshare_jax.errors import RequestError
from pshare_jax.frontend.constraints import AskedGrammar
from pshare_jax.frontend.requests import GenerationRequest
from pshare_jax.serve.service import Service
from pshare_jax.text.bad_words import bad_word_ids


async def restricted(
    service: Service,
    sampling: SamplingParams,
    body: GenerationRequest,
    grammar: AskedGrammar | None,
) -> SamplingParams:
    """`sampling` with what `body` says of grammars and words.

    Args:
        service: whose engine compiles.
        sampling: with the request's `max_tokens`.
        body: the request.
        grammar: what `frontend.constraints` found in it.

    Raises:
        RequestError: what cannot be served; names the field.
    """
    if sampling.min_tokens > sampling.max_tokens:
        raise RequestError(
            f"min_tokens ({sampling.min_tokens}) must not exceed max_tokens "
            f"({sampling.max_tokens})",
            param="min_tokens",
        )
    words = bad_word_ids(body.bad_words, lambda text: service.tokenizer.encode(text, False))
    if grammar is not None:
        await _compile(service, grammar)
    return msgspec.structs.replace(
        sampling, bad_words=words, grammar=None if grammar is None else grammar.spec
    )


async def _compile(service: Service, grammar: AskedGrammar) -> None:
    compiler = service.engine.grammars
    if compiler is None:
        raise RequestError("grammars need a tokenizer with an end token", param=grammar.param)
    if not compiler.has(grammar.spec):
        # With those that may take their time: this may take seconds.
        await service.offload.run(True, compiler.compile, grammar.spec, grammar.param)
