"""SmolLM2-135M, imported from its GGUF file and served: the whole way, with real text."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import jax.numpy as jnp
import openai
import pytest

from pshare_jax.convert.orbax import load_weights, read_manifest
from pshare_jax.demo.session import play, questions
from pshare_jax.engine.monolithic import Monolithic
from pshare_jax.models.weights import Weights
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.train.generate import Prompt, generate
from pshare_jax.train.loss import LoraShape, Recipe
from tests.e2e import metrics

# 135M weights take longer to compute than to compile.
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("optimised"),
]

MODELS = ("base", "family", "tools", "code")
FACTS = "The harbour office opens at nine. The ferry to Tarva leaves at ten past eight. "


@pytest.fixture(scope="module")
def tokenizer(real_base) -> Tokenizer:
    return Tokenizer.load(real_base / "tokenizer")


@pytest.fixture(scope="module")
def weights(real_base) -> Weights:
    return load_weights(real_base, dtype=jnp.float32)


@pytest.fixture
def api(real_server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real_server}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_it_knows_what_it_should(api):
    answer = api.chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=20,
        temperature=0,
    )
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"


def test_a_context_of_1000_tokens_is_computed_once_for_four_models(api, real_server):
    context = FACTS * 56
    before = metrics.read(real_server)["pshare_prefill_tokens_total"]
    answers = [
        api.completions.create(model=model, prompt=context, max_tokens=8, temperature=0)
        for model in MODELS
    ]
    after = metrics.read(real_server)["pshare_prefill_tokens_total"]
    cover = answers[0].usage.prompt_tokens - 1
    assert 1000 <= cover <= 1200
    details = [answer.usage.prompt_tokens_details.model_dump() for answer in answers]
    assert [d["cached_tokens"] for d in details] == [0, cover, cover, cover]
    assert [d["shared_tokens"] for d in details] == [0, cover, cover, cover]
    grown = {key: value - before.get(key, 0) for key, value in after.items()}
    assert sum(value for key, value in grown.items() if "computed" in key) == cover


def test_served_tokens_are_the_oracles(api, real_base, tokenizer, weights):
    prompt = tokenizer.encode("Once upon a time, in a harbour by the sea,")
    oracle = Monolithic(read_manifest(real_base).config, 64)
    expected = oracle.generate(weights, weights, prompt, 24)
    answer = api.completions.create(
        model="base",
        prompt=prompt,
        max_tokens=24,
        temperature=0,
        extra_body={"ignore_eos": True, "skip_special_tokens": False},
    )
    assert answer.choices[0].text == tokenizer.decode(expected, skip_special_tokens=False)


def test_served_tokens_are_the_trainers(api, real_base, real_modules, tokenizer, weights):
    """Greedy decoding by the trainer and by the server, of every trained module, in float32."""
    config = read_manifest(real_base).config
    asked: dict[str, list[list[int]]] = {}
    for question in questions():
        text = tokenizer.apply_chat_template([{"role": "user", "content": question.text}])
        asked.setdefault(question.model, []).append(tokenizer.encode(text, False))
    # Beside every module's own: then all batches are as long, and one program serves all.
    longest = max((prompt for prompts in asked.values() for prompt in prompts), key=len)
    assert asked.keys() == real_modules.keys()
    for name, folder in real_modules.items():
        certificate = read_manifest(folder).certificate
        lora = LoraShape(certificate.lora_rank, certificate.lora_alpha, certificate.lora_targets)
        assert len(asked[name]) == 2
        trained = generate(
            Recipe(config, "float32", lora),
            load_weights(folder, dtype=jnp.float32),
            weights,
            [
                Prompt(tokens, certificate.tail.split(tokens).covered)
                for tokens in (*asked[name], longest)
            ],
            max_tokens=24,
            end_token_ids=tokenizer.eos_token_ids,
            batch_size=3,
        )
        for prompt, expected in zip(asked[name], trained, strict=False):
            answer = api.completions.create(
                model=name,
                prompt=prompt,
                max_tokens=24,
                temperature=0,
                extra_body={"return_token_ids": True},
            )
            [choice] = answer.choices
            assert choice.token_ids == expected


def test_the_demo_shows_the_skills_of_its_modules(real_server):
    """One question of six is hard for its module too, in a context that holds the others."""
    result = asyncio.run(play(real_server, lambda text: None))
    assert {answer.question.model for answer in result.answers} == set(MODELS[1:])
    assert sum(answer.own_right for answer in result.answers) >= 5
    assert sum(answer.base_right for answer in result.answers) <= 1
