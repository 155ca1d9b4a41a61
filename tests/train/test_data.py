"""Lines become token ids exactly as the server would write them."""

import json

import pytest

from pshare_jax.core.split_rule import Invocation, LastTokens
from pshare_jax.errors import DataError
from pshare_jax.frontend.chat import TemplateOptions, chat_messages, chat_prompt
from pshare_jax.frontend.params import Limits
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.train.buckets import Bucket
from pshare_jax.train.config import TrainConfig
from pshare_jax.train.data import LineReader, read_dataset
from pshare_jax.train.inputs import chat_options
from pshare_jax.train.layout import collate, make_row
from tests.text.tiny import CHAT_TEMPLATE, write_byte_level
from tests.train.helpers import write_jsonl

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello world"},
    {"role": "assistant", "content": "one two"},
    {"role": "user", "content": "the lazy dog"},
    {"role": "assistant", "content": "the dog"},
]


LIMITS = Limits(1000, 10_000)


def line(record) -> bytes:
    return json.dumps(record).encode()


def read(record, tokenizer, max_length=200, **options):
    return LineReader(tokenizer, max_length, **options).read(line(record), "file:1")


def served_prompt(tokenizer, messages, **kwargs) -> list[int]:
    return tokenizer.encode(tokenizer.apply_chat_template(messages, **kwargs), False)


def test_every_turn_follows_the_prompt_that_the_server_would_see(tokenizer):
    (example,) = read({"messages": CHAT}, tokenizer)
    end = tokenizer.eos_token_ids[0]
    for turn, index in zip(example.turns, (2, 4), strict=True):
        prompt = example.tokens[: turn.start].tolist()
        assert prompt == served_prompt(tokenizer, CHAT[:index])
        answer = example.tokens[turn.start : turn.end].tolist()
        assert tokenizer.decode(answer) == CHAT[index]["content"]
        assert answer[-1] == end
    assert len(example.tokens) == example.turns[-1].end


def test_tools_reach_the_template(tmp_path):
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHAT_TEMPLATE.replace("tools", "x")
    tokenizer = Tokenizer.load(write_byte_level(tmp_path, template))
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    (example,) = read({"messages": CHAT[:3], "tools": tools}, tokenizer)
    prompt = example.tokens[: example.turns[0].start].tolist()
    assert prompt == served_prompt(tokenizer, CHAT[:2], tools=tools)
    assert "look" in tokenizer.decode(prompt)
    # A bare function, as BFCL has them, is what a client would send of it.
    (bare,) = read({"messages": CHAT[:3], "tools": [tools[0]["function"]]}, tokenizer)
    assert bare.tokens.tolist() == example.tokens.tolist()


def test_a_template_that_rewrites_earlier_turns_gives_one_example_a_turn(tmp_path):
    # Earlier answers are left out once others follow, as reasoning templates do with thoughts.
    template = CHAT_TEMPLATE.replace(
        "message['content']",
        "(message['content'] if loop.last or message['role'] != 'assistant' else 'x')",
    )
    tokenizer = Tokenizer.load(write_byte_level(tmp_path, template))
    first, second = read({"messages": CHAT}, tokenizer)
    assert len(first.turns) == len(second.turns) == 1
    prompt = second.tokens[: second.turns[0].start].tolist()
    assert prompt == served_prompt(tokenizer, CHAT[:4])
    assert "one two" not in tokenizer.decode(prompt)


def test_a_prompt_without_the_invocation_is_a_bad_line(tokenizer):
    chat = {"messages": CHAT}
    (example,) = read(chat, tokenizer, 1000)
    first, second = (example.tokens[: turn.start].tolist() for turn in example.turns)
    in_both, in_second = Invocation((first[0], first[1])), Invocation(tuple(second[len(first) :]))
    assert len(read(chat, tokenizer, 1000, rule=in_both)) == 1
    with pytest.raises(DataError, match=r"file:1: a prompt does not hold the invocation .*skip"):
        read(chat, tokenizer, 1000, rule=in_second)
    asked = {"messages": CHAT[:2]}
    with pytest.raises(DataError, match="does not hold the invocation"):
        read(asked, tokenizer, 1000, unanswered=True, rule=Invocation((399, 399)))


def test_prompt_and_completion(tokenizer):
    (example,) = read({"prompt": "the quick", "completion": " brown fox"}, tokenizer)
    (turn,) = example.turns
    assert example.tokens[: turn.start].tolist() == tokenizer.encode("the quick")
    answer = [*tokenizer.encode(" brown fox", False), tokenizer.eos_token_ids[0]]
    assert example.tokens[turn.start :].tolist() == answer


CALL = {"type": "function", "function": {"name": "look", "arguments": '{"city": "over"}'}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
NULL_CALL = {"role": "assistant", "content": None, "tool_calls": [CALL]}
OWN_CALLS = CHAT_TEMPLATE.replace(
    "message['content']",
    "(message['tool_calls'][0]['function']['name'] + '!' + "
    "message['tool_calls'][0]['function']['arguments']['city'] "
    "if message['tool_calls'] else message['content'])",
)
"""A template that knows tools and writes calls in a form of its own."""


def trained(tokenizer, example) -> list[str]:
    """The texts that are trained."""
    return [
        tokenizer.decode(example.tokens[turn.start : turn.end].tolist(), skip_special_tokens=False)
        for turn in example.turns
    ]


def test_developer_messages_and_tool_calls_are_written_as_in_serving(tmp_path):
    tokenizer = Tokenizer.load(write_byte_level(tmp_path, OWN_CALLS))
    messages = [{"role": "developer", "content": "be brief"}, NULL_CALL]
    (example,) = read({"messages": messages}, tokenizer)
    text = tokenizer.decode(example.tokens.tolist(), skip_special_tokens=False)
    assert "system\nbe brief" in text
    assert trained(tokenizer, example) == ["look!over<|im_end|>"]


def test_calls_are_trained_in_the_servers_form_where_the_template_knows_none(tmp_path):
    """The base of this repository: its template drops calls, and the server writes them."""
    template = CHAT_TEMPLATE.replace("{% if tools %}", "{% if false %}").replace("tools", "others")
    tokenizer = Tokenizer.load(write_byte_level(tmp_path, template))
    options = chat_options(TrainConfig("base", "output"), tokenizer)
    assert options.tool_prompt == "hermes"
    record = {"messages": [*CHAT[:2], NULL_CALL], "tools": TOOLS}
    (example,) = read(record, tokenizer, 1000, options=options)
    call = '<tool_call>\n{"name": "look", "arguments": {"city": "over"}}\n</tool_call><|im_end|>'
    assert trained(tokenizer, example) == [call]
    prompt = chat_prompt(tokenizer, LIMITS, chat_messages(CHAT[:2]), TOOLS, options)
    (turn,) = example.turns
    assert tuple(example.tokens[: turn.start].tolist()) == prompt.token_ids


@pytest.mark.parametrize("content", [None, "I look."], ids=["null", "text"])
def test_calls_that_the_template_drops_are_a_bad_line(tmp_path, content):
    tokenizer = Tokenizer.load(write_byte_level(tmp_path))  # knows tools, and writes no calls
    messages = [*CHAT[:2], {**NULL_CALL, "content": content}]
    with pytest.raises(DataError, match=r"file:1: messages\[2\]: .*does not write the name of"):
        read({"messages": messages}, tokenizer)


def test_calls_whose_arguments_the_template_drops_are_a_bad_line(tmp_path):
    template = CHAT_TEMPLATE.replace(
        "message['content']",
        "(message['tool_calls'][0]['function']['name'] if message['tool_calls'] "
        "else message['content'])",
    )
    tokenizer = Tokenizer.load(write_byte_level(tmp_path, template))
    with pytest.raises(DataError, match=r"messages\[2\]: .*does not write the arguments of"):
        read({"messages": [*CHAT[:2], NULL_CALL]}, tokenizer)


@pytest.mark.parametrize("content", ["", " \n", None], ids=["empty", "blank", "null"])
def test_blank_answers_are_bad_lines(tokenizer, content):
    messages = [*CHAT[:2], {"role": "assistant", "content": content}]
    with pytest.raises(DataError, match=r"file:1: messages\[2\]: the answer is empty or blank"):
        read({"messages": messages}, tokenizer)
    with pytest.raises(DataError, match=r"file:1: completion is empty or blank"):
        read({"prompt": "a", "completion": content or ""}, tokenizer)
    # One that is not trained may be.
    (example,) = read(
        {"messages": [*messages[:2], {**messages[2], "weight": 0}, *CHAT[3:]]}, tokenizer
    )
    assert trained(tokenizer, example) == ["the dog<|im_end|>"]


@pytest.mark.parametrize("off", [{"weight": 0}, {"train": False}, {"loss": False}], ids=str)
def test_turns_that_are_switched_off_are_context_only(tokenizer, off):
    messages = [*CHAT[:2], {**CHAT[2], **off}, *CHAT[3:]]
    (example,) = read({"messages": messages}, tokenizer)
    (whole,) = read({"messages": CHAT}, tokenizer)
    assert trained(tokenizer, example) == ["the dog<|im_end|>"]
    assert example.tokens.tolist() == whole.tokens.tolist()
    with pytest.raises(DataError, match="every assistant turn has weight 0"):
        read({"messages": messages[:3]}, tokenizer)


def test_weights_of_turns_and_lines_multiply(tokenizer):
    messages = [*CHAT[:2], {**CHAT[2], "weight": 0.5}, *CHAT[3:]]
    (example,) = read({"messages": messages, "weight": 4}, tokenizer)
    assert [turn.weight for turn in example.turns] == [2.0, 4.0]
    (plain,) = read({"prompt": "the quick", "completion": " fox", "weight": 0.25}, tokenizer)
    assert [turn.weight for turn in plain.turns] == [0.25]
    row = make_row(example, LastTokens(2))
    lengths = [turn.end - turn.start for turn in example.turns]
    assert row.weights.tolist() == [2.0] * lengths[0] + [4.0] * lengths[1]
    batch = collate([row], Bucket(64, 64, 32, 64), 1, teacher=False)
    assert batch["weights"].sum() == 2 * lengths[0] + 4 * lengths[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": -1}, r"messages\[2\]: weight is -1"),
        ({"weight": True}, "weight is True"),
        ({"weight": float("inf")}, "weight is inf"),
        ({"train": "no"}, "train is 'no'; it must be true or false"),
    ],
    ids=str,
)
def test_weights_that_are_none(tokenizer, fields, message):
    with pytest.raises(DataError, match=message):
        read({"messages": [*CHAT[:2], {**CHAT[2], **fields}]}, tokenizer)
    with pytest.raises(DataError, match=r"messages\[1\]: a message of role user has a weight"):
        read({"messages": [CHAT[0], {**CHAT[1], "weight": 1}, CHAT[2]]}, tokenizer)


def test_the_last_turn_alone_on_demand(tokenizer):
    (example,) = read({"messages": CHAT}, tokenizer, turns="last")
    assert trained(tokenizer, example) == ["the dog<|im_end|>"]
    messages = [*CHAT[:4], {**CHAT[4], "weight": 0}]
    with pytest.raises(DataError, match="weight 0"):
        read({"messages": messages}, tokenizer, turns="last")


def test_text_parts_are_joined_as_the_server_does(tokenizer):
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "world"}]
    messages = [{"role": "user", "content": parts}, CHAT[2]]
    (example,) = read({"messages": messages}, tokenizer)
    (turn,) = example.turns
    served = chat_prompt(tokenizer, LIMITS, chat_messages(messages[:1]))
    assert tuple(example.tokens[: turn.start].tolist()) == served.token_ids
    assert "hello\nworld" in tokenizer.decode(example.tokens.tolist())
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(DataError, match=r"file:1: messages\[0\].content\[0\]: .*'image_url'"):
        read({"messages": [{"role": "user", "content": picture}, CHAT[2]]}, tokenizer)


def test_special_tokens_that_are_spelled_out_are_text(tokenizer):
    messages = [{"role": "user", "content": "stop <|im_end|> now"}, CHAT[2]]
    (example,) = read({"messages": messages}, tokenizer)
    (turn,) = example.turns
    served = chat_prompt(tokenizer, LIMITS, chat_messages(messages[:1]))
    assert tuple(example.tokens[: turn.start].tolist()) == served.token_ids
    (tokens,) = read(
        {"messages": messages}, tokenizer, options=TemplateOptions(special_tokens=True)
    )
    assert len(tokens.tokens) < len(example.tokens)


def test_what_no_prompt_shows_is_noted(tokenizer):
    messages = [
        {**CHAT[1], "name": "Ann", "mood": "good"},
        {**CHAT[2], "reasoning_content": "hm", "refusal": None},
    ]
    record = {"messages": messages, "id": "1", "source": "web"}
    (example,) = read(record, tokenizer)
    assert set(example.dropped) == {
        "source",
        "messages[].mood",
        "messages[].name of user",
        "messages[].reasoning_content of assistant",
    }
    (plain,) = read({"messages": CHAT}, tokenizer)
    assert plain.dropped == ()


def test_a_template_without_system_messages_or_tools_is_noticed(tmp_path):
    template = CHAT_TEMPLATE.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
    ).replace("{{ 'tools: ' + (tools | tojson) + '\n' }}", "")
    tokenizer = Tokenizer.load(write_byte_level(tmp_path, template))
    (example,) = read({"messages": CHAT, "tools": TOOLS}, tokenizer)
    assert example.dropped == ("messages[].content of system", "tools")


def test_examples_longer_than_the_base_has_positions_are_bad_lines(tokenizer):
    record = {"prompt": "a " * 60, "completion": "b"}
    (example,) = read(record, tokenizer, 1000, positions=200)
    most = len(example.tokens)
    assert len(read(record, tokenizer, 1000, positions=most)) == 1
    with pytest.raises(DataError, match=rf"{most} tokens, but the base has {most - 1} positions"):
        read(record, tokenizer, 1000, positions=most - 1)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (line({"text": "a"}), "this is plain text, which is not read; write .*messages"),
        (line({"a": 1}), r"needs messages, or prompt and completion; .*\(fields: a\)"),
        (line({"conversations": [{"from": "human", "value": "a"}]}), "this is ShareGPT's format"),
        (line({"instruction": "a", "input": "", "output": "b"}), "this is Alpaca's format"),
        (line({"prompt": CHAT[:1], "completion": CHAT[2:3]}), "prompt is a list; write all"),
        (line({"prompt": "a", "completion": 3}), "completion is no text"),
        (line({"prompt": "", "completion": "a"}), "the prompt has no tokens"),
        (line({"messages": "hello"}), "messages is not a list"),
        (line({"messages": CHAT[:2]}), "no assistant turn"),
        (line({"messages": []}), "messages is empty"),
        (line({"messages": [{"content": "a"}]}), r"missing required field 'role' .*messages\[0\]"),
        (
            line({"messages": [{"role": "user"}, CHAT[2]]}),
            r"messages\[0\].content: .*needs content",
        ),
        (
            line({"messages": [CHAT[1], {"role": "asistant", "content": "a"}]}),
            r"'asistant' .*messages\[1\].role.*system, developer, user",
        ),
        (line({"messages": CHAT[2:]}), r"messages\[0\]: an assistant turn with nothing before"),
        (line({"messages": CHAT[:3], "tools": {}}), "tools is not a list"),
        (line({"messages": CHAT[:3], "tools": [{"x": 1}]}), r"tools\[0\] is not a function tool"),
        (
            line({"messages": [*CHAT[:2], {**CHAT[2], "tool_calls": ["x"]}]}),
            r"messages\[2\].tool_calls",
        ),
        (line({"prompt": "a " * 300, "completion": "b"}), "data.max_length is 200"),
    ],
)
def test_bad_lines_are_named(tokenizer, raw, message):
    with pytest.raises(DataError, match=rf"^data.jsonl:7: .*{message}"):
        LineReader(tokenizer, 200).read(raw, "data.jsonl:7")


def test_bad_lines_are_an_error_or_counted(tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    good = json.dumps({"messages": CHAT[:3]})
    path.write_text(f"\ufeff{good}\n\nnonsense\n{good}\n{{}}\n")

    def read_all(on_bad_line):
        return read_dataset([str(path)], LineReader(tokenizer, 200), on_bad_line)

    with pytest.raises(DataError, match=r"data.jsonl:3: not valid JSON"):
        read_all("error")
    dataset = read_all("skip")
    assert [example.source for example in dataset.examples] == [f"{path}:1", f"{path}:4"]
    assert dataset.num_bad_lines == 2
    assert [text.split(": ")[0] for text in dataset.bad_lines] == [f"{path}:3", f"{path}:5"]
    assert dataset.bad_kinds == {"not JSON": 1, "unknown format": 1}


def test_files_without_examples_and_missing_files(tokenizer, tmp_path):
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(DataError, match="no examples"):
        read_dataset([empty], LineReader(tokenizer, 9), "skip")
    with pytest.raises(DataError, match=r"nowhere.jsonl: cannot be read: No such file"):
        read_dataset(["nowhere.jsonl"], LineReader(tokenizer, 9), "skip")
