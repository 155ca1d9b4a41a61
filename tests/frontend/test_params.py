import json

import pytest

from pshare_jax.errors import CheckpointError
from pshare_jax.frontend.params import SamplingDefaults, sampling_defaults
from pshare_jax.text.tokenizer import Tokenizer
from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import running_server
from tests.text.tiny import write_byte_level

GIVEN = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": [2, 0], "do_sample": True}


@pytest.fixture
def tokenizer(tmp_path):
    folder = write_byte_level(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps(GIVEN))
    return Tokenizer.load(folder)


def test_what_the_models_makers_say_is_the_default(tokenizer, caplog):
    caplog.set_level("INFO")
    with running_server(fake_engine(tokenizer)) as client:
        assert "defaults of the base's generation_config.json" in caplog.text
        for ask in (client.complete, client.chat):
            ask()
            params = client.engine.submitted[-1].params
            assert (params.temperature, params.top_p, params.top_k) == (0.6, 0.95, 20)
            ask(temperature=0, top_p=1, top_k=-1)
            params = client.engine.submitted[-1].params
            assert (params.temperature, params.top_p, params.top_k) == (0.0, 1.0, 0)


def test_openais_defaults_may_be_had(tokenizer):
    config = fake_config(generation_config="none")
    with running_server(fake_engine(tokenizer, config)) as client:
        client.complete()
        params = client.engine.submitted[-1].params
    assert (params.temperature, params.top_p, params.top_k) == (1.0, 1.0, 0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, SamplingDefaults()),
        ({"temperature": None, "max_length": 20, "transformers_version": "4"}, SamplingDefaults()),
        ({"temperature": 0, "top_k": 50.0}, SamplingDefaults(temperature=0.0, top_k=50)),
        (
            {"min_p": 0.1, "repetition_penalty": 1.1},
            SamplingDefaults(min_p=0.1, repetition_penalty=1.1),
        ),
    ],
)
def test_generation_configs(given, expected):
    assert sampling_defaults(given) == expected


@pytest.mark.parametrize("given", [{"temperature": -1}, {"top_p": 2}, {"top_k": "many"}])
def test_what_cannot_be_sampled_with_is_refused(given):
    with pytest.raises(CheckpointError, match=f"generation_config.json: .*{next(iter(given))}"):
        sampling_defaults(given)
