"""LlamaIndex: OpenAILike over chat completions, and its Responses."""

from __future__ import annotations

from told import URL, tell  # isort: skip

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai import OpenAIResponses
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int


def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def model(**options: object) -> OpenAILike:
    """The server's model."""
    return OpenAILike(
        model="planner", api_base=URL, api_key="none", max_retries=0, is_chat_model=True, **options
    )


MESSAGES = [ChatMessage(role="user", content="hi")]
plain, calling = model(), model(is_function_calling_model=True)
schema = model(should_use_structured_outputs=True)
tool = FunctionTool.from_defaults(get_weather)
responses = OpenAIResponses(
    model="planner", api_base=URL, api_key="none", max_retries=0, context_window=8192
)
tell(
    text=plain.chat(MESSAGES).message.content,
    stream="".join(part.delta or "" for part in plain.stream_chat(MESSAGES)),
    completion=model().complete("hi").text,
    tool=str(calling.predict_and_call([tool], user_msg="weather?")),
    by_tool=calling.as_structured_llm(Person).chat(MESSAGES).raw.model_dump(),
    by_schema=schema.as_structured_llm(Person).chat(MESSAGES).raw.model_dump(),
    responses=responses.chat(MESSAGES).message.content,
)
