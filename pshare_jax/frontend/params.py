"""Checks a request's numbers and turns them into `SamplingParams` and `OutputParams`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from pshare_jax.core.requests import MAX_LOGIT_BIAS, MAX_LOGPROBS, SamplingParams
from pshare_jax.errors import CheckpointError, RequestError
from pshare_jax.frontend.requests import ChatRequest, CompletionRequest, GenerationRequest
from pshare_jax.text.detokenizer import MAX_STOP_STRINGS

MAX_SAMPLES = 128
MAX_STOP_CHARS = 1000
MAX_STOP_TOKENS = 256
MAX_SALT_CHARS = 256
# float32 cannot divide logits by less without overflow; the limit of such sampling is greedy.
GREEDY_BELOW = 1e-4


@dataclass(frozen=True)
class Limits:
    """What the served models and the operator allow.

    Args:
        vocab_size: number of token ids.
        max_model_len: most tokens of prompt and completion.
        max_n: most samples of a prompt.
        max_prompts: most prompts of a request.
        max_scored_tokens: most prompt tokens of a request whose log-probabilities are asked for.
    """

    vocab_size: int
    max_model_len: int
    max_n: int = MAX_SAMPLES
    max_prompts: int = 256
    max_scored_tokens: int = 16384


@dataclass(frozen=True)
class OutputParams:
    """How tokens become the text of an answer.

    `usage_so_far` puts the usage into every chunk of a stream, `include_usage` into a last one.
    `shown_specials` are special tokens that `skip_special_tokens` spares. Of `best_of` samples the
    `n` most likely ones are answered. `prompt_logprobs` is how many of the most likely tokens are
    listed for each place in the prompt, or None for no such list. No stop string ends an answer
    within its first `min_tokens` tokens.
    """

    n: int
    stream: bool
    include_usage: bool
    stop: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    logprobs: int | None
    echo: bool = False
    token_ids: bool = False
    usage_so_far: bool = False
    shown_specials: tuple[str, ...] = ()
    best_of: int = 1
    prompt_logprobs: int | None = None
    min_tokens: int = 0

    @property
    def prompt_scores(self) -> int | None:
        """Most likely tokens that are needed of each place in the prompt; None for no scores."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in wanted if count is not None), default=None)

    @property
    def least_tokens(self) -> int:
        """Fewest tokens that may be asked for: 0 where the prompt is part of the answer."""
        return 0 if self.echo or self.prompt_logprobs is not None else 1


def output_params(
    body: CompletionRequest | ChatRequest,
    max_n: int = MAX_SAMPLES,
    shown_specials: tuple[str, ...] = (),
) -> OutputParams:
    """Checks and collects everything that concerns the answer.

    Raises:
        RequestError: a value out of range, or a combination that cannot be served.
    """
    best_of = n = 1 if body.n is None else _bounded("n", body.n, 1, max_n)
    stream = bool(body.stream)
    options = body.stream_options
    if options is not None and not stream:
        raise RequestError("stream_options needs stream: true", param="stream_options")
    if isinstance(body, ChatRequest):
        _check_chat(body)
        echo, logprobs = False, _chat_logprobs(body)
    else:
        echo, logprobs = bool(body.echo), body.logprobs
        best_of = _best_of(body, n, max_n)
        if body.suffix:
            raise RequestError("suffix is not served: no model here fills in", param="suffix")
    if logprobs is not None:
        param = "top_logprobs" if isinstance(body, ChatRequest) else "logprobs"
        logprobs = _bounded(param, logprobs, 0, MAX_LOGPROBS)
    prompt_logprobs = body.prompt_logprobs
    if prompt_logprobs is not None:
        prompt_logprobs = _bounded("prompt_logprobs", prompt_logprobs, 0, MAX_LOGPROBS)
        if stream:
            raise RequestError("prompt_logprobs is not served in streams", param="prompt_logprobs")
    if echo and logprobs is not None and stream and n > 1:
        raise RequestError("a stream that echoes logprobs needs n = 1", param="n")
    return OutputParams(
        n=n,
        stream=stream,
        include_usage=options is not None and bool(options.include_usage),
        stop=_stop_strings(body.stop),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        logprobs=logprobs,
        echo=echo,
        token_ids=bool(body.return_token_ids),
        shown_specials=shown_specials,
        usage_so_far=options is not None and bool(options.continuous_usage_stats),
        best_of=best_of,
        prompt_logprobs=prompt_logprobs,
        min_tokens=_min_tokens(body),
    )


def request_priority(body: CompletionRequest | ChatRequest) -> int:
    """Among the requests of a client, lower ones are served earlier; 0 where nothing is said.

    Raises:
        RequestError: out of range.
    """
    return 0 if body.priority is None else _bounded("priority", body.priority, -(2**31), 2**31 - 1)


@dataclass(frozen=True)
class SamplingDefaults:
    """What counts where a request says nothing: OpenAI's values, or those of a model's makers."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def sampling_defaults(generation_config: Mapping[str, Any]) -> SamplingDefaults:
    """The defaults of a checkpoint's `generation_config.json`.

    Raises:
        CheckpointError: a value that cannot be sampled with.
    """
    names = inspect.signature(SamplingDefaults).parameters
    given = {n: generation_config[n] for n in names if generation_config.get(n) is not None}
    try:
        body = msgspec.convert({"model": "", **given}, GenerationRequest)
        params = sampling_params(body, Limits(2**31, 1), 1, None)
    except (msgspec.ValidationError, RequestError) as error:
        raise CheckpointError(
            f"generation_config.json: {error}; server.generation_config: none ignores it"
        ) from error
    return SamplingDefaults(**{name: getattr(params, name) for name in names})


def sampling_params(
    body: GenerationRequest,
    limits: Limits,
    max_tokens: int,
    logprobs: int | None,
    defaults: SamplingDefaults | None = None,
) -> SamplingParams:
    """Checks and collects everything that concerns the choice of tokens.

    Raises:
        RequestError: a value out of range.
    """
    defaults = defaults or SamplingDefaults()
    temperature = _float("temperature", body.temperature, defaults.temperature, 0.0, 100.0)
    top_k = defaults.top_k if body.top_k is None else _bounded("top_k", body.top_k, -1, 2**63 - 1)
    top_p = _float("top_p", body.top_p, defaults.top_p, 0.0, 1.0)
    if top_p == 0.0:
        raise RequestError("top_p must be above 0 and at most 1, got 0", param="top_p")
    seed = None if body.seed is None else _bounded("seed", body.seed, -(2**63), 2**63 - 1)
    if body.cache_salt is not None and len(body.cache_salt) > MAX_SALT_CHARS:
        raise RequestError(
            f"cache_salt must have at most {MAX_SALT_CHARS} characters", param="cache_salt"
        )
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_k=min(max(top_k, 0), limits.vocab_size),
        top_p=top_p,
        min_p=_float("min_p", body.min_p, defaults.min_p, 0.0, 1.0),
        seed=sample_seed(seed, 0),
        repetition_penalty=_float(
            "repetition_penalty",
            body.repetition_penalty,
            defaults.repetition_penalty,
            0.01,
            100.0,
        ),
        presence_penalty=_float("presence_penalty", body.presence_penalty, 0.0, -2.0, 2.0),
        frequency_penalty=_float("frequency_penalty", body.frequency_penalty, 0.0, -2.0, 2.0),
        logit_bias=_logit_bias(body.logit_bias or {}, limits.vocab_size),
        logprobs=logprobs,
        stop_token_ids=_stop_token_ids(body.stop_token_ids or [], limits.vocab_size),
        ignore_eos=bool(body.ignore_eos),
        min_tokens=_min_tokens(body),
        allowed_token_ids=_allowed_token_ids(body.allowed_token_ids, limits.vocab_size),
    )


def sample_seed(seed: int | None, index: int) -> int | None:
    """Seed of sample `index` of a request: a 32-bit number, as the device's generator takes."""
    return None if seed is None else (seed + index) % 2**32


def check_token_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises RequestError if an id is not one of the model's."""
    for token_id in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{param}: token id {_brief(token_id)} is out of range; the model has ids 0 to "
                f"{vocab_size - 1}",
                param=param,
            )


def resolve_max_tokens(
    given: float | None,
    default: int | None,
    prompt_len: int,
    limits: Limits,
    param: str,
    least: int = 1,
) -> int:
    """Most tokens to generate after a prompt of `prompt_len` tokens.

    A number that the client gave must fit and be `least` or more; the default (None: as many as
    fit) is cut to fit.

    Raises:
        RequestError: the prompt, or the prompt with its completion, is too long.
    """
    room = limits.max_model_len - prompt_len
    if given is not None and given < least:
        raise RequestError(
            f"max_tokens must be at least {least}, got {_brief(int(given))}", param="max_tokens"
        )
    wanted = int(given) if given is not None else 1
    if wanted > room:
        raise RequestError(
            f"This model's maximum context length is {limits.max_model_len} tokens. However, you "
            f"requested {_brief(prompt_len + wanted)} tokens ({prompt_len} in the {param}, "
            f"{_brief(wanted)} in the completion). Please reduce the length of the {param} or "
            "completion.",
            param=param,
            code="context_length_exceeded",
        )
    if given is not None:
        return wanted
    return room if default is None else min(default, room)


def check_scored(output: OutputParams, prompt_tokens: int, limits: Limits) -> None:
    """Raises RequestError if scores of too many prompt tokens are asked for."""
    if output.prompt_scores is not None and prompt_tokens > limits.max_scored_tokens:
        raise RequestError(
            f"log-probabilities of {prompt_tokens} prompt tokens are asked for; the server takes "
            f"{limits.max_scored_tokens} a request (server.max_scored_tokens)",
            param="logprobs" if output.prompt_logprobs is None else "prompt_logprobs",
        )


def _min_tokens(body: GenerationRequest) -> int:
    return _bounded("min_tokens", body.min_tokens or 0, 0, 2**31)


def _best_of(body: CompletionRequest, n: int, max_n: int) -> int:
    if body.best_of is None:
        return n
    best_of = _bounded("best_of", body.best_of, 1, max_n)
    if best_of < n:
        raise RequestError(f"best_of ({best_of}) must be at least n ({n})", param="best_of")
    if best_of > n and body.stream:
        raise RequestError("best_of above n cannot be streamed", param="best_of")
    return best_of


def _check_chat(body: ChatRequest) -> None:
    if body.functions and body.tools:
        raise RequestError("give tools or functions, not both", param="functions")
    if body.modalities not in (None, ["text"]):
        raise RequestError("modalities must be ['text']", param="modalities")


def _chat_logprobs(body: ChatRequest) -> int | None:
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    return int(body.top_logprobs or 0) if body.logprobs else None


def _bounded(name: str, value: float, low: int, high: int) -> int:
    whole = int(value)
    if not low <= whole <= high:
        raise RequestError(
            f"{name} must be between {low} and {high}, got {_brief(whole)}", param=name
        )
    return whole


def _float(name: str, value: float | None, default: float, low: float, high: float) -> float:
    if value is None:
        return default
    if not low <= value <= high:
        raise RequestError(f"{name} must be between {low:g} and {high:g}, got {value}", param=name)
    return value


def _brief(value: int) -> str:
    if abs(value) < 10**40:
        return str(value)
    # Python refuses to write thousands of digits.
    return f"a number of {int(value.bit_length() * 0.30103) + 1} digits"


def _stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOP_STRINGS:
        raise RequestError(
            f"stop may hold at most {MAX_STOP_STRINGS} strings, got {len(stops)}", param="stop"
        )
    if not all(0 < len(text) <= MAX_STOP_CHARS for text in stops):
        raise RequestError(
            f"each stop string must have 1 to {MAX_STOP_CHARS} characters", param="stop"
        )
    return stops


def _stop_token_ids(ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    if len(ids) > MAX_STOP_TOKENS:
        raise RequestError(
            f"stop_token_ids may hold at most {MAX_STOP_TOKENS} ids, got {len(ids)}",
            param="stop_token_ids",
        )
    check_token_ids(ids, vocab_size, "stop_token_ids")
    return tuple(ids)


def _allowed_token_ids(ids: Sequence[int] | None, vocab_size: int) -> tuple[int, ...]:
    if ids is None:
        return ()
    if not ids:
        raise RequestError("allowed_token_ids must not be empty", param="allowed_token_ids")
    if len(ids) > vocab_size:
        raise RequestError(
            f"allowed_token_ids holds {len(ids)} ids; the model has {vocab_size}",
            param="allowed_token_ids",
        )
    check_token_ids(ids, vocab_size, "allowed_token_ids")
    return tuple(sorted(set(ids)))


def _logit_bias(bias: Mapping[str, float], vocab_size: int) -> dict[int, float]:
    if len(bias) > MAX_LOGIT_BIAS:
        raise RequestError(
            f"logit_bias may hold at most {MAX_LOGIT_BIAS} tokens, got {len(bias)}",
            param="logit_bias",
        )
    biases: dict[int, float] = {}
    for key, value in bias.items():
        # The length check keeps int() from being asked for thousands of digits.
        if not (key.isascii() and key.isdigit() and len(key) <= 20):
            raise RequestError(
                f"logit_bias: {key[:40]!r} is not a token id written as a number",
                param="logit_bias",
            )
        biases[int(key)] = _float("logit_bias", value, 0.0, -100.0, 100.0)
    check_token_ids(list(biases), vocab_size, "logit_bias")
    return biases
