"""What a client asks of the engine, and what it hears: requests, how to sample, outputs."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from pshare_jax.core.constraints import GrammarSpec, Thoughts

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300


class SamplingParams(msgspec.Struct, frozen=True):
    """How the next token is chosen; the defaults are OpenAI's and vLLM's.

    Order on the device: masks, repetition, presence and frequency penalties, logit bias,
    temperature, min-p, top-k, top-p. `temperature` 0 (or less than 1e-5) is greedy; `top_k` 0,
    `top_p` 1 and `min_p` 0 are off; equal scores are kept or dropped together. `logprobs` asks for
    the log-probability (of the unmodified distribution, natural log) of the chosen token and of
    that many most likely ones; None asks for none. `stop_token_ids` come on top of the model's own
    end tokens, which `ignore_eos` turns off unless there is a grammar. `prompt_logprobs` asks for
    the log-probability of each prompt token and of that many most likely ones in its place
    (`core/prompt_scores.py`); `max_tokens` may be 0.

    Masks leave out tokens: what does not follow `grammar`, once the `thoughts` before it have
    ended; what is not in `allowed_token_ids`, unless those are empty; the last token of each of
    `bad_words` (token ids) where the answer ends with those before it; and what would end an answer
    of less than `min_tokens`. A mask that would leave nothing gives way, a grammar never does.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict[int, float])
    logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    prompt_logprobs: int | None = None
    grammar: GrammarSpec | None = None
    thoughts: Thoughts | None = None
    min_tokens: int = 0
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()

    @property
    def masked(self) -> bool:
        """Whether which tokens may come next depends on those that came."""
        limited = self.allowed_token_ids or self.bad_words or self.min_tokens > 0
        return self.grammar is not None or bool(limited)


class Session(msgspec.Struct, frozen=True):
    """What a client says about the calls to come; hints, which change no token.

    Args:
        id: calls of one id (and one salt) stay with the same workers; empty is no session.
        ttl: seconds for which the pages should outlive the call.
        next_models: names of the models that will be asked next.
    """

    id: str = ""
    ttl: float = 0.0
    next_models: tuple[str, ...] = ()


class Owner(msgspec.Struct, frozen=True):
    """Whose a sequence is, for fair shares.

    Args:
        key: name of the client; clients share what there is by their weights.
        weight: share of the client, relative to others that want something.
        request: what the client has asked for at once; a client's share is divided among its
            requests, whatever their number of sequences. Empty is a request of its own.
        priority: among a client's requests; lower is earlier.
    """

    key: str = ""
    weight: float = 1.0
    request: str = ""
    priority: int = 0


class Request(msgspec.Struct, frozen=True):
    """One sequence to be generated: `prompt_token_ids` by `model`.

    Requests with different `cache_salt` never share pages. A `probe` is part of another request's
    work, which counters do not count. `goes_on` says that the next prompt will probably begin with
    this one and its reply, see `core.sessions`.
    """

    id: str
    model: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = msgspec.field(default_factory=SamplingParams)
    cache_salt: str = ""
    probe: bool = False
    owner: Owner = Owner()
    session: Session = Session()
    goes_on: bool = True


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class PromptUsage(msgspec.Struct, frozen=True):
    """Where the KV of a prompt came from, in tokens.

    `prompt_tokens = computed + cached + tail`: the tail (at least 1) is read by the decode module.
    Of the cached tokens, `shared` were computed for another model.
    """

    prompt_tokens: int
    computed_tokens: int
    cached_tokens: int
    shared_tokens: int
    handoff_bytes: int = 0


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Natural-log probabilities at one position: the chosen token's, and the most likely ones'."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class RequestTimes(msgspec.Struct):
    """When the dispatcher heard what of a request, in seconds of its host's monotonic clock.

    Only the first attempt's: a request that is routed again keeps them.

    Args:
        submitted: it was taken; of the engine, before the dispatcher has heard of it.
        prefill: a prefill worker had begun with its prompt.
        covered: all of the prompt's KV was there, computed or found.
        started: a decode worker had its pages and a slot.
        routed: its workers were chosen.
        prefill_worker: which covers its prompt.
        decode_worker: which generates.
    """

    submitted: float
    prefill: float | None = None
    covered: float | None = None
    started: float | None = None
    routed: float | None = None
    prefill_worker: str = ""
    decode_worker: str = ""


class RequestOutput(msgspec.Struct, frozen=True):
    """One event of a request.

    Token events carry `token_ids` (one or more, with one `logprobs` entry each when asked for).
    The first event carries `usage` and `times`, the last one `times`, too, and `finish_reason`; the
    stop token that ended the sequence is its last token id and `stop_token` names it. `error` goes
    with ERROR. `prompt_logprobs`, when asked for, come once, before any token: an entry for each
    prompt token, None for the first.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    usage: PromptUsage | None = None
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    error: str | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    times: RequestTimes | None = None
