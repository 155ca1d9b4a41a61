"""The API's objects: what a request may hold and what an answer looks like.

Requests name every field that is understood; any other is refused. Fields of type `Ignored` are
OpenAI's bookkeeping, which changes nothing here. Optional fields may be null.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType

Ignored = Any


class StreamOptions(Struct, forbid_unknown_fields=True):
    """`include_usage` adds a last chunk with the usage."""

    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class GenerationRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """What both generation endpoints understand, vLLM's additions included."""

    model: str
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    cache_salt: str | None = None
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None


class CompletionRequest(GenerationRequest, kw_only=True):
    """`POST /v1/completions`. A list of numbers is one prompt of token ids."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None
    return_token_ids: bool | None = None


class ContentPart(Struct):
    """One part of a message; only text parts are served."""

    type: str
    text: str | None = None


class ToolFunction(Struct):
    """The function of a tool call; `arguments` is JSON text, or already an object."""

    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(Struct):
    """A tool call that an assistant message made."""

    function: ToolFunction
    id: str | None = None
    type: str = "function"


class ChatMessage(Struct):
    """One message. Fields that no chat template reads (`refusal`, `audio`, ...) are dropped."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class FunctionSchema(Struct):
    """A tool's function; everything beside the name is the template's business."""

    name: str


class Tool(Struct):
    """The part of a tool that is checked before the whole goes to the chat template."""

    type: Literal["function"]
    function: FunctionSchema


class ResponseFormat(Struct):
    """Only `text` is served."""

    type: str


class ChatRequest(GenerationRequest, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage]
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    modalities: list[str] | None = None
    parallel_tool_calls: Ignored = None
    reasoning_effort: Ignored = None
    verbosity: Ignored = None


class TokenizeRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """`POST /tokenize`: either `prompt`, or `messages` for the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """`POST /detokenize`."""

    tokens: list[int]
    model: str | None = None


class PromptTokensDetails(Struct):
    """Of the prompt's tokens: how many were not computed, and how many of those came from another
    model's call.
    """

    cached_tokens: int
    shared_tokens: int


class Usage(Struct):
    """Tokens of one HTTP request; each prompt counts once, however many samples it had."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(Struct):
    """Log-probabilities of a completion, one entry a token; `text_offset` is in characters."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Struct):
    """One text, or one piece of it in a stream; `token_ids` if `return_token_ids` was set."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    token_ids: list[int] | UnsetType = UNSET


class Completion(Struct):
    """Answer, or stream chunk, of `/v1/completions`."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    object: str = "text_completion"


class TopLogprob(Struct):
    """One of the most likely tokens at a position."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct):
    """The chosen token at a position, and the most likely ones."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    """Log-probabilities of a message, one entry a token."""

    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(Struct):
    """A whole answer."""

    content: str
    role: str = "assistant"
    refusal: None = None


class Delta(Struct):
    """A piece of an answer; the first one carries the role."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChoice(Struct):
    """One answer: `message` as a whole, or `delta` in a stream."""

    index: int
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    message: AssistantMessage | UnsetType = UNSET
    delta: Delta | UnsetType = UNSET


class ChatCompletion(Struct):
    """Answer, or stream chunk, of `/v1/chat/completions`."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | UnsetType | None = UNSET


class ModelCard(Struct):
    """One served decode module; `parent` is the base whose KV it reads when `sharing` says so."""

    id: str
    created: int
    root: str
    parent: str
    sharing: str
    kind: str
    tail: int | dict[str, Any]
    max_model_len: int
    object: str = "model"
    owned_by: str = "pshare_jax"


class ModelList(Struct):
    """Answer of `/v1/models`."""

    data: list[ModelCard]
    object: str = "list"


class TokenizeResponse(Struct):
    """Answer of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(Struct):
    """Answer of `/detokenize`."""

    prompt: str
