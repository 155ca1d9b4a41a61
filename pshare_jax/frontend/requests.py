"""What a request may hold.

Requests name every field that is understood. Fields of type `Ignored` are OpenAI's bookkeeping, or
hints that nothing here needs: they change nothing. Optional fields may be null, which is as good as
absent. Whole numbers may be written with a fraction of zero, as JavaScript and R clients do.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

Ignored = Any
Whole = int | float

_WHOLE = (
    "n",
    "max_tokens",
    "min_tokens",
    "seed",
    "top_k",
    "truncate_prompt_tokens",
    "prompt_logprobs",
    "priority",
)

# Fields of OpenAI's and vLLM's APIs that would change the answer, and are not served: to ignore
# them would be to lie. Each may still be null, empty, false or 0.
UNSERVED = {
    "audio": "audio is not generated",
    "logits_processors": "code of the client is not run",
    "use_beam_search": "beam search is not served",
}


class StreamOptions(Struct):
    """`include_usage` adds a last chunk with the usage; `continuous_usage_stats` the usage so far
    to every other chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Ignored = None


class SessionHints(Struct, kw_only=True):
    """What a client may say about calls to come; no answer depends on it.

    `session_id` (or the header `X-Session-Id`) keeps calls together, `ttl` is for how many seconds
    their KV should be kept, `next_models` names who will be asked next.
    """

    session_id: str | None = None
    ttl: float | None = None
    next_models: list[str] | None = None


class GenerationRequest(SessionHints, kw_only=True):
    """What both generation endpoints understand, vLLM's additions included."""

    model: str
    n: Whole | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    max_tokens: Whole | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: Whole | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    top_k: Whole | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: Whole | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | bool | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Whole | None = None
    return_token_ids: bool | None = None
    prompt_logprobs: Whole | None = None
    cache_salt: str | None = None
    priority: Whole | None = None
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    prediction: Ignored = None
    spaces_between_special_tokens: Ignored = None

    def __post_init__(self) -> None:
        for name in _WHOLE:
            make_whole(self, name)


class CompletionRequest(GenerationRequest, kw_only=True):
    """`POST /v1/completions`. A list of numbers is one prompt of token ids."""

    prompt: str | list[str | int | list[int]]
    logprobs: Whole | None = None
    echo: bool | None = None
    best_of: Whole | None = None
    suffix: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        make_whole(self, "logprobs")
        make_whole(self, "best_of")


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
    """One message. Fields that no chat template reads (`refusal`, `audio`, ...) are dropped;
    `reasoning` is another spelling of `reasoning_content`, `function_call` and the role `function`
    are the older ones of a call and its result."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: Any = None
    function_call: ToolFunction | None = None

    def __post_init__(self) -> None:
        if self.reasoning_content is None and isinstance(self.reasoning, str):
            self.reasoning_content = self.reasoning


class FunctionSchema(Struct):
    """A tool's function; everything beside the name is the template's business."""

    name: str
    parameters: dict[str, Any] | None = None


class Tool(Struct):
    """The part of a tool that is checked before the whole goes to the chat template."""

    type: Literal["function"]
    function: FunctionSchema


class ChatRequest(GenerationRequest, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage]
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_completion_tokens: Whole | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[str] | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    reasoning_effort: Ignored = None
    verbosity: Ignored = None

    def __post_init__(self) -> None:
        super().__post_init__()
        make_whole(self, "max_completion_tokens")
        make_whole(self, "top_logprobs")


class FanoutRequest(ChatRequest, kw_only=True):
    """`POST /v1/fanout`: a chat for several models."""

    model: list[str]  # type: ignore[reportIncompatibleVariableOverride]

    def of(self, model: str) -> ChatRequest:
        """The chat for one of the models."""
        fields: dict[str, Any] = {
            name: getattr(self, name) for name in ChatRequest.__struct_fields__ if name != "model"
        }
        return ChatRequest(model=model, **fields)


class TokenizeRequest(Struct, kw_only=True):
    """`POST /tokenize`: either `prompt`, or `messages` for the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Struct, kw_only=True):
    """`POST /detokenize`."""

    tokens: list[int]
    model: str | None = None


def make_whole(request: Struct, name: str) -> None:
    """Turns a field like 16.0 into 16.

    Raises:
        ValueError: it has a fraction; worded and placed as msgspec words and places its errors.
    """
    value = getattr(request, name)
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError(f"Expected `int`, got `float` - at `$.{name}`")
        setattr(request, name, int(value))
