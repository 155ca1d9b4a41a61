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


def test_every_finished_answer_validates(tokenizer):
    """Nested models, unions told apart by a field, references, optional fields, formats."""
    compiler = GrammarCompiler(tokenizer)
    schemas = list({json.dumps(m.model_json_schema()): name for name, m in models().items()})
    assert len(schemas) >= COUNT
    finished = 0
    for number, source in enumerate(schemas[:: len(schemas) // COUNT][:COUNT]):
        state = compiler.compile(GrammarSpec("json_schema", source), "schema")
        rng = random.Random(number)
        text = sample(tokenizer, state, rng, use_forced=bool(number % 2), max_tokens=150)
        if text is not None:
            finished += 1
            jsonschema.validate(json.loads(text), json.loads(source))
    assert finished > COUNT / 4
