"""What the API's answers look like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import UNSET, Struct, UnsetType


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
    """Log-probabilities of a completion, one entry a token; `text_offset` is in characters.

    Where the prompt is echoed, its tokens come first; the very first has no probability.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(Struct, gc=False):
    """One token at a place in the prompt; `rank` counts from 1, None if it is not known."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]
"""An entry for each prompt token, by token id: the most likely ones and the prompt's own. None for
the first."""


class CompletionChoice(Struct):
    """One text, or one piece of it in a stream.

    With `return_token_ids`: `token_ids` of the text, and `prompt_token_ids`, in a stream once.
    """

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: Sequence[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(Struct):
    """Answer, or stream chunk, of `/v1/completions`."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    object: str = "text_completion"


class TopLogprob(Struct, gc=False):
    """One of the most likely tokens at a position.

    Not garbage-collected: an answer may hold a hundred thousand, and they form no cycles.
    """

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct, gc=False):
    """The chosen token at a position, and the most likely ones."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    """Log-probabilities of a message, one entry a token."""

    content: list[TokenLogprob]
    refusal: None = None


class FunctionCall(Struct):
    """What is called; `arguments` is JSON text. In a stream the name comes once, first."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCall(Struct):
    """A call; in a stream `index` tells calls apart, and all but arguments come once."""

    function: FunctionCall
    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


class AssistantMessage(Struct):
    """A whole answer. Content may be null beside calls; `function_call` answers `functions`."""

    content: str | None
    role: str = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET
    function_call: FunctionCall | UnsetType = UNSET


class Delta(Struct):
    """A piece of an answer; the first one carries the role."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET
    function_call: FunctionCall | UnsetType = UNSET


class ChatChoice(Struct):
    """One answer: `message` as a whole, or `delta` in a stream."""

    index: int
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    message: AssistantMessage | UnsetType = UNSET
    delta: Delta | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Struct):
    """Answer, or stream chunk, of `/v1/chat/completions`."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: Sequence[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class FanoutAnswer(Struct):
    """Answer of `/v1/fanout`: for each model a `ChatCompletion`, or its name with an `error`.

    `usage` is the sum over all models; at the end of a stream it comes without answers.
    """

    id: str
    object: str
    created: int
    answers: Sequence[Any]
    usage: Usage


class ModelCard(Struct):
    """One served decode module; `parent` is the base whose KV it reads when `sharing` says so.

    `chat_template` names how messages are rendered: chats of models with one name share prompts.
    `weights` is the form in which they are computed, as in the configuration.
    """

    id: str
    created: int
    root: str
    parent: str
    sharing: str
    kind: str
    tail: int | dict[str, Any]
    max_model_len: int
    chat_template: str | None = None
    weights: str = "plain"
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
