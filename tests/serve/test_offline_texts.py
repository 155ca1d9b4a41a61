"""The offline engine's texts, beside the server's."""

import dataclasses

import pytest

from pshare_jax.core.requests import FinishReason, PromptUsage, RequestOutput
from pshare_jax.engine.completion import Collector
from pshare_jax.frontend.output import SequenceOutput
from pshare_jax.frontend.params import OutputParams

PLAIN = OutputParams(1, False, False, (), False, True, None)
USAGE = PromptUsage(3, 3, 0, 0)


def events(ids: list[int], stop_token: int | None, reason: FinishReason) -> list[RequestOutput]:
    """A token an event, the last two together."""
    outputs = [RequestOutput("x", token_ids=(token,), usage=USAGE) for token in ids[:-2]]
    last = RequestOutput("x", tuple(ids[-2:]), finish_reason=reason, stop_token=stop_token)
    return [*outputs, last]


@pytest.mark.parametrize("stop", [(), ("world",)])
@pytest.mark.parametrize("ends", ["stop token", "end token", "length"])
def test_texts_are_those_of_the_server(tokenizer, stop, ends):
    """A stop token is a token of the answer, and not of its text."""
    said = tokenizer.encode("hello the dog", False)
    if stop:
        said += tokenizer.encode(" world and more", False)
    end = {"stop token": tokenizer.encode("the", False)[0], "end token": 2, "length": None}[ends]
    ids = said if end is None else [*said, end]
    reason = FinishReason.LENGTH if end is None else FinishReason.STOP
    sequence = SequenceOutput(tokenizer, dataclasses.replace(PLAIN, stop=stop))
    collector = Collector(tokenizer, stop)
    for event in events(ids, end, reason):
        collector.add(event)
        if sequence.finish_reason is None:
            sequence.feed(event)
    completion = collector.completion()
    assert completion.text == sequence.take().text
    assert completion.text == ("hello the dog " if stop else "hello the dog")
    assert completion.finish_reason is sequence.finish_reason
    if not stop:
        assert completion.token_ids == ids
