"""Instructor: a typed answer in each of its modes for such servers, and one that grows."""

from __future__ import annotations

from told import URL, USER, tell  # isort: skip

from collections.abc import Iterable

import instructor
import openai
from pydantic import BaseModel


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int


api = openai.OpenAI(base_url=URL, api_key="none", max_retries=0)
results = {}
for mode in ("TOOLS", "PARALLEL_TOOLS", "JSON", "JSON_SCHEMA", "MD_JSON", "TOOLS_STRICT"):
    client = instructor.from_openai(api, mode=instructor.Mode[mode])
    parallel = mode == "PARALLEL_TOOLS"
    kind = Iterable[Person] if parallel else Person
    made = client.chat.completions.create(
        model="planner", messages=USER, response_model=kind, max_retries=0
    )
    results[mode] = [one.model_dump() for one in made] if parallel else made.model_dump()
responses = instructor.from_openai(api, mode=instructor.Mode.RESPONSES_TOOLS)
results["RESPONSES_TOOLS"] = responses.responses.create(
    model="planner", input="hi", response_model=Person, max_retries=0
).model_dump()
growing = instructor.from_openai(api, mode=instructor.Mode.JSON_SCHEMA)
parts = list(
    growing.chat.completions.create_partial(
        model="planner", messages=USER, response_model=Person, max_retries=0
    )
)
results["partial"] = parts[-1].model_dump()
tell(**results)
