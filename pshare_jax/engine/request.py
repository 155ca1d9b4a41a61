"""What goes into an engine and what comes out of it. No jax here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; the defaults are OpenAI's and vLLM's.

    Order on the device: repetition, presence and frequency penalties, logit bias, temperature,
    min-p, top-k, top-p. `temperature` 0 (or less than 1e-5) is greedy; `top_k` 0 and `top_p` 1
    and `min_p` 0 are off; equal scores are kept or dropped together. `logprobs` asks for the
    log-probability (of the unmodified distribution, natural log) of the chosen token and of that
    many most likely ones; None asks for none. `stop_token_ids` come on top of the model's own end
    tokens, which `ignore_eos` turns off.
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
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class Request:
    """One sequence to be generated: `prompt_token_ids` by `model`.

    Requests with different `cache_salt` never share pages.
    """

    id: str
    model: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    cache_salt: str = ""


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True)
class PromptUsage:
    """Where the KV of a prompt came from, in tokens.

    `prompt_tokens = computed + cached + tail`: the tail (at least 1) is read by the decode module.
    Of the cached tokens, `shared` were computed for another model.
    """

    prompt_tokens: int
    computed_tokens: int
    cached_tokens: int
    shared_tokens: int
    handoff_bytes: int = 0


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probabilities at one position: the chosen token's, and the most likely ones'."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class RequestOutput:
    """One event of a request.

    Token events carry `token_ids` (one or more, with one `logprobs` entry each when asked for).
    The first event carries `usage`. The last event carries `finish_reason`; the stop token that
    ended the sequence is its last token id and `stop_token` names it. `error` goes with ERROR.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    usage: PromptUsage | None = None
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    error: str | None = None
