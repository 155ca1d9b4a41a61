"""Random answers under grammars: whatever is sampled, every finished answer follows its grammar."""

import argparse
import contextlib
import inspect
import itertools
import json
import random
import re
import threading
import time
from pathlib import Path

import jsonschema
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer
from tokenizers.trainers import BpeTrainer

from pshare_jax.core.constraints import GrammarSpec
from pshare_jax.errors import QueueFullError, RequestError
from pshare_jax.text import grammar_spec, grammar_trial
from pshare_jax.text.grammar import GrammarCompiler, GrammarError, GrammarLimits
from pshare_jax.text.tokenizer import Tokenizer
from tests.text.random_answers import allowed, sample
from tests.text.tiny import write_byte_level, write_sentencepiece

CHOICES = ["yes", 'n"o', "a\\b", "x\ny", "é🙂", "/re/", "yes!"]


def write_larger(folder) -> None:
    """A BPE of 4,000 tokens that has learned code and JSON, with tokens that span its syntax."""
    backend = HfTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    # None of ours: what these tests draw would change with every line of it.
    modules = (argparse, inspect, json, re)
    texts = [Path(str(module.__file__)).read_text() for module in modules]
    rng = random.Random(1)
    texts += [json.dumps({f"k{i}": [rng.random(), None, "é\n"]}, indent=2) for i in range(200)]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.train_from_iterator(
        texts,
        BpeTrainer(
            vocab_size=4000,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=special,
            show_progress=False,
        ),
    )
    backend.add_tokens([AddedToken('"}', normalized=False), AddedToken('": "', normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))


@pytest.fixture(scope="module", params=["tiny", "larger", "sentencepiece"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "tiny":
        write_byte_level(folder)
    elif request.param == "larger":
        write_larger(folder)
    else:
        write_sentencepiece(folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer)


def random_schema(rng: random.Random, depth: int = 3) -> dict:
    """A schema of the keywords that are supported, with bounds so that answers end."""
    simple = [
        lambda: {"type": "integer", "minimum": rng.randint(-99, 0), "maximum": rng.randint(1, 999)},
        lambda: {"type": "number", "minimum": 0, "exclusiveMaximum": 10},
        lambda: {"type": "boolean"},
        lambda: {"type": "null"},
        lambda: {"type": "string", "maxLength": rng.randint(0, 6)},
        lambda: {"type": "string", "minLength": 2, "maxLength": 4},
        lambda: {"type": "string", "pattern": rng.choice(["^[a-c]{1,3}$", "^x?[0-9]{2}$"])},
        lambda: {"type": "string", "format": rng.choice(["date", "time", "ipv4", "uuid"])},
        lambda: {"enum": rng.sample(["a", 'q"', "é\n", 5, None, True, [1], {"k": "v"}], 3)},
        lambda: {"const": rng.choice(["fixed", 1, {"a": [1, 2]}])},
        lambda: {"type": ["integer", "null"], "maximum": 50, "minimum": 0},
    ]
    if depth == 0:
        return rng.choice(simple)()

    def inner() -> dict:
        return random_schema(rng, depth - 1)

    def an_object() -> dict:
        names = rng.sample(["a", "b", "long name", 'q"', "é"], rng.randint(1, 4))
        return {
            "type": "object",
            "properties": {name: inner() for name in names},
            "required": rng.sample(names, rng.randint(0, len(names))),
            "additionalProperties": False,
        }

    nested = [
        an_object,
        an_object,
        lambda: {"type": "array", "items": inner(), "minItems": 1, "maxItems": 3},
        lambda: {"type": "array", "prefixItems": [inner(), inner()], "items": False, "minItems": 2},
        lambda: {"anyOf": [inner(), inner()]},
    ]
    return rng.choice(nested)()


def test_every_finished_answer_validates(tokenizer, compiler):
    rng = random.Random(7)
    finished = 0
    for number in range(80):
        schema = random_schema(rng)
        if number % 5 == 0:  # references count from the root
            ref = {"$ref": "#/$defs/x"}
            schema = {"$defs": {"x": schema}, "type": "array", "maxItems": 2, "items": ref}
        spec = GrammarSpec("json_schema", json.dumps(schema))
        state = compiler.compile(spec, "schema")
        text = sample(tokenizer, state, rng, use_forced=bool(number % 2))
        if text is not None:
            finished += 1
            value = json.loads(text)
            jsonschema.validate(
                value, schema, format_checker=jsonschema.FormatChecker(["date", "ipv4"])
            )
            assert re.search(r"\s{35}", re.sub(r'"[^"]*"', "", text)) is None
    assert finished > 65


@pytest.mark.parametrize(
    ("spec", "check"),
    [
        (GrammarSpec("json_object"), lambda text: isinstance(json.loads(text), dict)),
        (GrammarSpec("regex", "(ab|c[0-9]){2}é?"), re.compile("(ab|c[0-9]){2}é?").fullmatch),
        (
            GrammarSpec(
                "choice", json.dumps(["yes", 'n"o', "a\\b", "x\ny", "é🙂", "/re/", "yes!"])
            ),
            lambda text: text in ["yes", 'n"o', "a\\b", "x\ny", "é🙂", "/re/", "yes!"],
        ),
        (
            GrammarSpec("lark", 'start: "(" start? ")"'),
            lambda text: re.fullmatch(r"(\(+)(\)+)", text) and text.count("(") == text.count(")"),
        ),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_other_grammars(tokenizer, compiler, spec, check):
    rng = random.Random(3)
    texts = []
    # How many end in time depends on the vocabulary: of JSON's objects a third.
    for number in range(100):
        text = sample(tokenizer, compiler.compile(spec, "g"), rng, use_forced=bool(number % 2))
        if text is not None:
            texts.append(text)
        if number >= 29 and len(texts) > 10:
            break
    assert len(texts) > 10
    assert all(check(text) for text in texts), texts


def test_each_choice_can_be_reached(tokenizer, compiler):
    texts = CHOICES
    for text in texts:
        state = compiler.compile(GrammarSpec("choice", json.dumps(texts)), "choice")
        ids = tokenizer.encode(text, add_special_tokens=False)
        if b"".join(map(tokenizer.token_bytes, ids)) != text.encode():
            continue  # SentencePiece writes a space before a text, which is none of the choices
        state.accept(*ids)
        assert state.complete


class TestState:
    @pytest.fixture
    def state(self, compiler):
        schema = {
            "type": "object",
            "properties": {"name": {"const": "hi"}, "n": {"enum": [1, 2]}},
            "required": ["name", "n"],
            "additionalProperties": False,
        }
        return compiler.compile(GrammarSpec("json_schema", json.dumps(schema)), "schema")

    def test_forced_tokens_are_where_one_text_is_left(self, tokenizer, compiler):
        state = compiler.compile(GrammarSpec("regex", "hello hello [ab]"), "regex")
        forced = state.forced()
        state.accept(*forced)
        text = tokenizer.decode(forced, skip_special_tokens=False)
        assert "hello hello ".startswith(text)
        assert text
        one = compiler.compile(GrammarSpec("choice", '["h"]'), "choice")
        one.accept(*one.forced())
        assert one.finished
        assert one.forced() == ()
        assert set(allowed(one, tokenizer.vocab_size)) == set(tokenizer.eos_token_ids)

    def test_a_forbidden_token_is_an_error(self, tokenizer, state):
        forbidden = next(
            i for i in range(tokenizer.vocab_size)
            if i not in allowed(state, tokenizer.vocab_size) and tokenizer.token_bytes(i)
        )  # fmt: skip
        with pytest.raises(GrammarError, match=f"forbids token {forbidden}:"):
            state.accept(forbidden)

    def test_an_end_token_ends_only_what_is_complete(self, tokenizer, state):
        with pytest.raises(GrammarError):
            state.accept(tokenizer.eos_token_ids[0])

    def test_tokens_can_be_taken_back(self, tokenizer, state):
        before = allowed(state, tokenizer.vocab_size).tolist()
        rng = random.Random(0)
        count = 0
        for _ in range(4):
            choices = allowed(state, tokenizer.vocab_size)
            state.accept(int(rng.choice(choices)))
            count += 1
        state.rollback(count)
        assert allowed(state, tokenizer.vocab_size).tolist() == before
        with pytest.raises(GrammarError, match="cannot be taken back"):
            state.rollback(5)

    def test_copies_and_compilations_go_their_own_ways(self, tokenizer, compiler, state):
        copy = state.copy()
        copy.accept(int(allowed(copy, tokenizer.vocab_size)[0]))
        again = state.copy()
        assert allowed(again, tokenizer.vocab_size).tolist() == (
            allowed(state, tokenizer.vocab_size).tolist()
        )


UNSUPPORTED = [
    ({"not": {"type": "string"}}, '"not"'),
    ({"type": "array", "uniqueItems": True}, '"uniqueItems"'),
    ({"type": "array", "contains": {"type": "integer"}}, '"contains"'),
    ({"type": "object", "propertyNames": {"pattern": "a"}}, '"propertyNames"'),
    ({"if": {"type": "string"}, "then": {}}, '"if"'),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, '"dependentRequired"'),
    ({"properties": {"a": {"properties": {"b": {"not": {}}}}}}, '"not"'),
    ({"type": "string", "format": "telephone"}, "telephone"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ({"$ref": "#/nowhere"}, "/nowhere"),
    ({"$ref": "https://example.com/schema.json"}, "example.com"),
    ({"type": "frob"}, "frob"),
    ({"enum": []}, "schema"),
]


@pytest.mark.parametrize(("schema", "named"), UNSUPPORTED, ids=lambda v: str(v)[:40])
def test_what_is_not_supported_is_named(compiler, schema, named):
    spec = GrammarSpec("json_schema", json.dumps(schema))
    with pytest.raises(RequestError) as caught:
        compiler.compile(spec, "response_format")
    assert caught.value.param == "response_format"
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "spec",
    [
        GrammarSpec("regex", "a(b"),
        GrammarSpec("lark", "start: foo"),
        GrammarSpec("lark", "nonsense"),
        GrammarSpec("lark", 'start: "a" start'),
    ],
    ids=lambda spec: spec.source,
)
def test_broken_and_hostile_grammars_are_refused(compiler, spec):
    start = time.thread_time()
    with pytest.raises(RequestError, match="g: the grammar cannot be used"):
        compiler.compile(spec, "g")
    assert time.thread_time() - start < 5


@pytest.mark.parametrize(
    "source",
    ["(a{1000}){1000}", "((a|b){500}c{500}){500}", "([a-z]{1,500}x){1,500}", "(.*a){20}.{500}"],
)
def test_hostile_grammars_cost_little_or_are_refused(tokenizer, compiler, source):
    slowest, start = 0.0, time.thread_time()
    try:
        state = compiler.compile(GrammarSpec("regex", source), "g")
        for step in range(200):
            choices = allowed(state, tokenizer.vocab_size)
            state.accept(int(choices[step * 7919 % len(choices)]))
            slowest, start = max(slowest, time.thread_time() - start), time.thread_time()
    except (RequestError, GrammarError):
        slowest = max(slowest, time.thread_time() - start)
    assert slowest < 0.5


def test_a_slow_grammar_is_refused(tokenizer):
    slow = GrammarCompiler(tokenizer, GrammarLimits(compile_seconds=0.0))
    with pytest.raises(RequestError, match="s to compile; at most 0 s are given"):
        slow.compile(GrammarSpec("json_object"), "g")


def test_a_large_grammar_is_refused(tokenizer):
    small = GrammarCompiler(tokenizer, GrammarLimits(max_symbols=50))
    names = {f"p{i}": {"type": "integer"} for i in range(100)}
    spec = GrammarSpec("json_schema", json.dumps({"type": "object", "properties": names}))
    with pytest.raises(RequestError, match="grammar size"):
        small.compile(spec, "g")


def test_the_cache_is_bounded(tokenizer):
    compiler = GrammarCompiler(tokenizer, cache_entries=3)
    for number in [0, 1, 2, 0, 3]:
        compiler.compile(GrammarSpec("choice", json.dumps([f"h{number}"])), "choice")
    assert compiler.cached == 3
    assert [json.loads(spec.source)[0] for spec in compiler._cache] == ["h2", "h0", "h3"]


def _names(count: int) -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return ["".join(name) for name in itertools.islice(itertools.product(letters, repeat=3), count)]


def _rules_in_a_row(count: int) -> str:
    names = _names(count + 1)
    lines = [f"{name}:{following}" for name, following in itertools.pairwise(names)]
    return "\n".join([f"start:{names[0]}", *lines, f'{names[-1]}:"b"'])


def _nested_rules_in_a_row(count: int) -> str:
    names = _names(count + 1)
    pairs = itertools.pairwise(names)
    lines = [f"{name}:{'(' * 8}{following}{')?' * 8}" for name, following in pairs]
    return "\n".join([f"start:{names[0]}", *lines, f'{names[-1]}:"b"'])


def _references_in_a_row(count: int) -> str:
    names = _names(count + 1)
    defs = {n: {"items": {"$ref": f"#/$defs/{f}"}} for n, f in itertools.pairwise(names)}
    schema = {"$ref": f"#/$defs/{names[0]}", "$defs": {**defs, names[-1]: {"type": "null"}}}
    return json.dumps(schema, separators=(",", ":"))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("lark", _rules_in_a_row(8000)),
        ("lark", _nested_rules_in_a_row(2000)),
        ("json_schema", _references_in_a_row(1500)),
    ],
    ids=["rules", "nested-rules", "references"],
)
def test_no_grammar_is_so_deep_that_the_process_ends(tokenizer, kind, text):
    """On a thread's usual stack of 8 MiB each of these ends it by SIGSEGV."""
    limits = GrammarLimits(compile_seconds=60)
    assert len(text) <= limits.max_chars
    with contextlib.suppress(RequestError):
        GrammarCompiler(tokenizer, limits).compile(GrammarSpec(kind, text), "grammar")


def test_a_thread_that_is_not_to_be_had_is_said(tokenizer, monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    compiler = GrammarCompiler(tokenizer)
    for compile in (compiler.compile, compiler.hold):
        with pytest.raises(QueueFullError, match="no thread to compile"):
            compile(GrammarSpec("regex", "a"), "grammar")
    assert not compiler._held
    assert threading.stack_size() == 0


@pytest.fixture(scope="module")
def tried(tokenizer):
    limits = GrammarLimits(compile_seconds=0.5)
    return GrammarCompiler(tokenizer, limits, trial=True)


@pytest.mark.parametrize("tokenizer", ["larger"], indirect=True)
def test_a_grammar_that_takes_for_ever_is_refused_and_the_next_one_is_taken(tried):
    """Two kilobytes of schema: to say what is wrong with them takes 2^40 steps, whatever tokens
    there are."""
    patterns = [{"pattern": f"a{{{n}}}b*"} for n in range(40)]
    spec = GrammarSpec("json_schema", json.dumps({"allOf": patterns}))
    for _ in range(2):
        with pytest.raises(RequestError, match="response_format: the grammar takes too much time"):
            tried.compile(spec, "response_format")
        assert tried.compile(GrammarSpec("regex", "ab*"), "grammar")
    with pytest.raises(RequestError, match="unknown name"):
        tried.compile(GrammarSpec("lark", "start: nothing"), "grammar")


def test_a_grammar_that_ends_the_process_that_tries_it_is_refused(tried):
    assert tried.compile(GrammarSpec("regex", "b+"), "grammar")
    process = tried._trial._process
    process.kill()
    process.wait()
    # One that has ended before is none that the grammar has ended.
    assert tried.compile(GrammarSpec("regex", "c+"), "grammar")
    other = tried._trial._process
    assert other is not process
    other.kill()
    other.wait()
    assert not tried._trial._compiles(other, "{}")


def test_without_a_process_there_is_no_trial(tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(grammar_trial.sys, "executable", "/no/such/python")
    compiler = GrammarCompiler(tokenizer, trial=True)
    for text in ("a", "b"):
        assert compiler.compile(GrammarSpec("regex", text), "grammar")
    assert len([r for r in caplog.records if "without a trial" in r.message]) == 1
    monkeypatch.undo()
    trial = compiler._trial
    assert trial is not None
    trial._retry_at = 0.0  # a minute later
    assert compiler.compile(GrammarSpec("regex", "c"), "grammar")
    assert trial._process is not None
    assert trial._process.poll() is None


def test_numbers_that_json_has_not_are_refused(tokenizer):
    for text in ('{"minimum": 1e400}', '{"minimum": NaN}'):
        spec = grammar_spec.from_structured_outputs({"json": text}, GrammarLimits())
        assert spec is not None
        with pytest.raises(RequestError, match="json: the grammar cannot be used"):
            GrammarCompiler(tokenizer).compile(spec, "json")
