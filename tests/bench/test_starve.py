"""The small request is timed while the flood goes on, and the flood is cut off after it."""

import pytest

from pshare_jax.bench import starve
from pshare_jax.errors import BenchmarkError
from pshare_jax.text.tokenizer import Tokenizer
from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import eventually, running_server
from tests.text.tiny import write_byte_level

SIZES = {"long_prompts": 3, "long_tokens": 20, "samples": 4, "prompts": 5, "hot_requests": 6}


@pytest.fixture
def server(tmp_path):
    tokenizer = Tokenizer.load(write_byte_level(tmp_path))
    with running_server(fake_engine(tokenizer, fake_config(max_model_len=400))) as client:
        yield client


def options(server, **fields) -> starve.StarveOptions:
    common = {"model": "planner", "other_model": "coder", "head_start": 0.0, "probes": 2}
    return starve.StarveOptions(
        **{"url": server.url, "reply_tokens": 300, **common, **SIZES, **fields}
    )


def test_every_flood(server):
    result = starve.run(options(server))
    assert list(result["floods"]) == list(starve.FLOODS)
    assert all(len(found["seconds"]) == 2 for found in result["floods"].values())
    eventually(lambda: not server.engine.running_ids)
    table = "\n".join(starve.lines(result))
    assert "| 3 prompts of 20 tokens |" in table
    assert "| `n: 4` |" in table
    small = [r for r in server.engine.submitted if r.prompt_token_ids == (5, 6)]
    assert [r.model for r in small] == ["planner"] * 3 + ["planner"] * 9 + ["coder"] * 3
    assert len(server.engine.submitted) - len(small) == 3 + 4 + 5 + 6


def test_a_flood_that_is_refused_is_no_result(server):
    with pytest.raises(BenchmarkError, match=r"400: .*maximum context length"):
        starve.run(options(server, floods=["samples"], reply_tokens=9999, head_start=0.2))
    with pytest.raises(BenchmarkError, match="no such flood: 'x'"):
        starve.run(options(server, floods=["x"]))
