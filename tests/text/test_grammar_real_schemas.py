"""Schemas that clients send: those of the OpenAI client's own models, some hundreds of them."""

import importlib
import json
import pkgutil
import random

import jsonschema
import openai.types.chat
import openai.types.responses
import pydantic
import pytest

from pshare_jax.core.constraints import GrammarSpec
from pshare_jax.text.grammar import GrammarCompiler
from pshare_jax.text.tokenizer import Tokenizer
from tests.text.random_answers import sample
from tests.text.tiny import write_byte_level

COUNT = 300


def models() -> dict[str, type[pydantic.BaseModel]]:
    """Models by module and name, each once."""
    found: dict[str, type[pydantic.BaseModel]] = {}
    for package in (openai.types, openai.types.chat, openai.types.responses):
        for info in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            for name, value in vars(module).items():
                if isinstance(value, type) and issubclass(value, pydantic.BaseModel):
                    found[f"{value.__module__}.{name}"] = value
    return dict(sorted(found.items()))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(write_byte_level(tmp_path_factory.mktemp("tokenizer")))


def schemas() -> list[str]:
    """`COUNT` different ones of all kinds. To write one takes its model's library some time."""
    found: dict[str, None] = {}
    shuffled = list(models().values())
    random.Random(1).shuffle(shuffled)
    for model in shuffled:
        found[json.dumps(model.model_json_schema())] = None
        if len(found) == COUNT:
            return list(found)
    raise AssertionError(f"there are {len(found)} only")


def test_every_finished_answer_validates(tokenizer):
    """Nested models, unions told apart by a field, references, optional fields, formats."""
    compiler = GrammarCompiler(tokenizer)
    finished = 0
    for number, source in enumerate(schemas()):
        state = compiler.compile(GrammarSpec("json_schema", source), "schema")
        rng = random.Random(number)
        text = sample(tokenizer, state, rng, use_forced=bool(number % 2), max_tokens=150)
        if text is not None:
            finished += 1
            # Without looking at the schema itself, which takes longer than all the rest.
            jsonschema.Draft202012Validator(json.loads(source)).validate(json.loads(text))
    assert finished > COUNT / 4
