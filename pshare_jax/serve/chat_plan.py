"""A chat that has been checked and tokenised, whichever API it came by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from pshare_jax.core.requests import SamplingParams
from pshare_jax.errors import RequestError
from pshare_jax.frontend.answers import AnswerReader
from pshare_jax.frontend.chat import (
    Prompt,
    TemplateOptions,
    chat_prompt,
    parameter_schemas,
    usable_tools,
)
from pshare_jax.frontend.constraints import chat_grammar, thoughts_before
from pshare_jax.frontend.params import (
    OutputParams,
    check_scored,
    output_params,
    request_priority,
    resolve_max_tokens,
    sampling_params,
)
from pshare_jax.frontend.requests import ChatRequest
from pshare_jax.frontend.tool_calls.parser import ToolParser
from pshare_jax.serve.formats import Format
from pshare_jax.serve.generate import Job
from pshare_jax.serve.restrictions import restricted
from pshare_jax.serve.service import Service
from pshare_jax.serve.templates import beginnings


@dataclass(frozen=True)
class ChatPlan:
    """What is to be generated, and how its text is to be read.

    Args:
        body: the request.
        prompt: what the model reads.
        sampling: how tokens are chosen.
        output: how they become text.
        new_reader: makes the reader of one sample.
        call_id: makes the id of a call, of what says which one it is.
        priority: among the client's requests.
    """

    body: ChatRequest
    prompt: Prompt
    sampling: SamplingParams
    output: OutputParams
    new_reader: Callable[[], AnswerReader]
    call_id: Callable[[str], str]
    priority: int = 0

    def job(self, spelling: Format, arrival: float) -> Job:
        """The job whose answer is written as `spelling` says; `arrival` as in `Job`."""
        return Job(
            model=self.body.model,
            prompts=[self.prompt],
            sampling=[self.sampling],
            output=self.output,
            cache_salt=self.body.cache_salt or "",
            format=spelling,
            arrival=arrival,
            hints=self.body,
            priority=self.priority,
        )


async def plan_chat(
    service: Service, body: ChatRequest, large: bool, clip: bool = False
) -> ChatPlan:
    """Checks and tokenises a chat.

    Args:
        service: whose models are asked.
        body: the request; its model is served.
        large: whether it may take its time.
        clip: whether more `max_tokens` than fit are as many as fit.

    Raises:
        RequestError: what cannot be served.
    """
    model = service.format_of(body.model)
    output = output_params(body, service.limits.max_n, model.markers)
    sampling = sampling_params(body, service.limits, 1, output.logprobs, service.sampling_defaults)
    tools = usable_tools(body)
    prompt = await chat_prompt_of(service, body, large)
    wanted, room = _max_tokens(body), service.limits.max_model_len - len(prompt.token_ids)
    if clip and wanted is not None and wanted > room:
        wanted = None
    max_tokens = resolve_max_tokens(
        wanted, None, len(prompt.token_ids), service.limits, "messages", output.least_tokens
    )
    check_scored(output, len(prompt.token_ids), service.limits)
    schemas = parameter_schemas(tools)
    one_call = bool(body.functions) or body.parallel_tool_calls is False
    grammar = await service.offload.run_if(
        large, chat_grammar, body, model, service.tokenizer, service.grammar_limits
    )
    thoughts = thoughts_before(grammar, model, prompt, service.tokenizer)
    sampling = msgspec.structs.replace(sampling, max_tokens=max_tokens, thoughts=thoughts)
    [sampling] = await restricted(service, [sampling], body, grammar)
    await _note_template(service, body, prompt, large)
    return ChatPlan(
        body,
        prompt,
        sampling,
        output,
        lambda: model.reader(schemas, prompt.in_reasoning, one_call),
        (model.parser or ToolParser).call_id,
        request_priority(body),
    )


async def _note_template(service: Service, body: ChatRequest, prompt: Prompt, large: bool) -> None:
    """Counts what the model's own chat template loses."""
    if not service.templates.may_lose(body.model):
        return
    shared_by = body.cache_salt, body.chat_template_kwargs, usable_tools(body)
    begun = await service.offload.run_if(large, beginnings, shared_by, body.messages)
    service.templates.chat(body.model, begun, len(prompt.token_ids))


async def chat_prompt_of(service: Service, body: ChatRequest, large: bool) -> Prompt:
    """The prompt of a chat, rendered and tokenised beside the event loop; `large` as above.

    Raises:
        RequestError: what cannot be rendered, or is too long.
    """
    options = TemplateOptions(
        body.add_generation_prompt is not False,
        body.chat_template_kwargs,
        bool(body.add_special_tokens),
        body.truncate_prompt_tokens,
        service.format_of(body.model).tool_prompt,
        service.config.special_tokens_in_text,
    )
    return await service.offload.run(
        large,
        chat_prompt,
        service.tokenizer_of(body.model),
        service.limits,
        body.messages,
        usable_tools(body),
        options,
    )


def _max_tokens(body: ChatRequest) -> float | None:
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise RequestError(
            "max_tokens and max_completion_tokens differ; give one", param="max_completion_tokens"
        )
    return old if new is None else new
