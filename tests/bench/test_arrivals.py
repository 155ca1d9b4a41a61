"""Sessions that arrive together, and the short request behind them, over HTTP."""

import pytest

from pshare_jax.bench import arrivals
from pshare_jax.errors import BenchmarkError, ConfigError
from pshare_jax.text.tokenizer import Tokenizer
from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import eventually, running_server
from tests.text.tiny import write_byte_level

SMALL = {"sessions": 5, "prompt_tokens": 20, "reply_tokens": 6, "short_tokens": 3, "chunk": 8}


@pytest.fixture
def server(tmp_path):
    tokenizer = Tokenizer.load(write_byte_level(tmp_path))
    with running_server(fake_engine(tokenizer, fake_config(max_model_len=400))) as client:
        yield client


def options(server, **fields) -> arrivals.ArrivalsOptions:
    common = {"url": server.url, "models": ["planner", "coder"], "behind": 0.0}
    return arrivals.ArrivalsOptions(**{**common, **SMALL, **fields})


def test_who_is_asked_what(server):
    result = arrivals.run(options(server, rounds=2))
    eventually(lambda: not server.engine.running_ids)
    assert len(result["rounds"]) == 2
    for found in result["rounds"]:
        assert len(found["first"]) == 5
        assert found["first"] == sorted(found["first"])
        assert min(found["alone"], found["chunk"], found["short"], found["short_alone"]) > 0
    asked = [r for r in server.engine.submitted if len(r.prompt_token_ids) == 20]
    # One by one, then all at once; each prompt is another one.
    assert [r.model for r in asked[:5]] == ["planner", "coder", "planner", "coder", "planner"]
    assert [r.params.max_tokens for r in asked[:5]] == [1] * 5
    assert sorted(r.model for r in asked[5:10]) == ["coder"] * 2 + ["planner"] * 3
    assert [r.params.max_tokens for r in asked[5:10]] == [6] * 5
    assert len({r.prompt_token_ids for r in asked}) == 20


def test_what_is_printed():
    found = {"alone": 8.0, "chunk": 0.25, "first": [2.0] * 15 + [10.0]}
    found |= {"short_alone": 0.1, "short": 0.5}
    result = {"options": {"models": ["a", "b"], **SMALL}, "rounds": [found]}
    first, *_, row = arrivals.lines(result)
    assert first == "5 sessions at once, 20 tokens each, of 2 models; behind them 3 tokens."
    assert row == "| 8.00 | 2.00 | 4.00 | 0.50 | 0.10 | 0.50 | 1.6 |"


def test_what_is_refused_is_no_result(server):
    with pytest.raises(BenchmarkError, match=r"400: .*maximum context length"):
        arrivals.run(options(server, reply_tokens=9999))
    with pytest.raises(ConfigError, match="needs models"):
        options(server, models=[])
