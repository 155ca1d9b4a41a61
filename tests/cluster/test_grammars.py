"""Grammars in worker processes: whose thread compiles them, and for how long they are kept."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pshare_jax.core.constraints import GrammarSpec
from pshare_jax.core.requests import FinishReason
from pshare_jax.text.tokenizer import Tokenizer
from tests.cluster.harness import Cluster, Host, running_cluster
from tests.engine.harness import Models, wait_until
from tests.helpers import tiny_config
from tests.text.tiny import write_byte_level

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
SPECS = [GrammarSpec("regex", f"[a-d]{{3}}{letter}[x-z]{{2}}") for letter in "efghijkl"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    tokenizer = Tokenizer.load(write_byte_level(tmp_path_factory.mktemp("tokenizer")))
    models = Models(tiny_config(vocab_size=tokenizer.vocab_size + 21), tokenizer)
    models.add_full("full", 1)
    folder = tmp_path_factory.mktemp("cluster")
    with running_cluster(models, folder, prefill=1, decode=1) as cluster:
        yield cluster
        cluster.check_idle()


@pytest.fixture
def decode(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Host:
    """The decode worker, which keeps one grammar of which it has no sequence, and whose thread may
    compile none."""
    host = cluster.hosts["decode0"]
    grammars = host.hosted._grammars
    assert grammars is not None
    compiler, thread = grammars._compiler, host.hosted.thread
    assert thread is not None

    def on_a_deep_stack(function: Any) -> Any:
        assert threading.current_thread() is not thread._thread
        return function()

    monkeypatch.setattr("pshare_jax.text.grammar.on_a_deep_stack", on_a_deep_stack)
    monkeypatch.setattr(compiler, "_cache_entries", 1)
    return host


def kept(host: Host) -> int:
    assert host.hosted._grammars is not None
    return len(host.hosted._grammars._held)


def test_no_grammar_is_compiled_while_others_wait(cluster: Cluster, decode: Host) -> None:
    """However many sequences wait for a slot, each with a grammar of its own."""
    [client] = cluster.clients
    tokenizer = cluster.models.tokenizer
    assert tokenizer is not None
    replies = [
        client.submit("full", [i, *PROMPT], 20, grammar=spec, ignore_eos=False)
        for i, spec in enumerate(SPECS * 2)
    ]
    for reply, spec in zip(replies, SPECS * 2, strict=True):
        assert reply.wait().reason is FinishReason.STOP, reply.error
        assert re.fullmatch(spec.source, tokenizer.decode(reply.tokens))
    wait_until(lambda: kept(decode) == 0)
    assert decode.hosted._grammars is not None
    assert decode.hosted._grammars._compiler.cached == 1


def test_a_grammar_goes_with_a_sequence_that_is_given_up(cluster: Cluster, decode: Host) -> None:
    [client] = cluster.clients
    endless = GrammarSpec("regex", "[a-d]{100}")
    reply = client.submit("full", PROMPT, 100, grammar=endless, ignore_eos=False)
    reply.next_event()
    assert kept(decode) == 1
    client.abort(reply)
    wait_until(lambda: kept(decode) == 0)
