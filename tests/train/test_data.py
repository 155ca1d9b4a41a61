"""Lines become token ids exactly as the server would write them."""

import json

import pytest

from pshare_jax.core.split_rule import Invocation
from pshare_jax.errors import DataError
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.train.data import read_dataset, read_line
from tests.text.tiny import CHAT_TEMPLATE, write_byte_level
from tests.train.helpers import write_jsonl

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello world"},
    {"role": "assistant", "content": "one two"},
    {"role": "user", "content": "the lazy dog"},
    {"role": "assistant", "content": "the dog"},
]


def line(record) -> bytes:
    return json.dumps(record).encode()


def read(record, tokenizer, max_length=200):
    return read_line(line(record), tokenizer, max_length, "file:1")


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
    raw = line({"messages": CHAT})
    (example,) = read_line(raw, tokenizer, 1000, "file:3")
    first, second = (example.tokens[: turn.start].tolist() for turn in example.turns)
    in_both, in_second = Invocation((first[0], first[1])), Invocation(tuple(second[len(first) :]))
    assert len(read_line(raw, tokenizer, 1000, "file:3", rule=in_both)) == 1
    with pytest.raises(DataError, match=r"file:3: a prompt does not hold the invocation .*skip"):
        read_line(raw, tokenizer, 1000, "file:3", rule=in_second)
    asked = line({"messages": CHAT[:2]})
    with pytest.raises(DataError, match="does not hold the invocation"):
        read_line(asked, tokenizer, 1000, "file:3", unanswered=True, rule=Invocation((399, 399)))


def test_prompt_and_completion(tokenizer):
    (example,) = read({"prompt": "the quick", "completion": " brown fox"}, tokenizer)
    (turn,) = example.turns
    assert example.tokens[: turn.start].tolist() == tokenizer.encode("the quick")
    answer = [*tokenizer.encode(" brown fox", False), tokenizer.eos_token_ids[0]]
    assert example.tokens[turn.start :].tolist() == answer


def test_developer_messages_and_tool_calls_are_written_as_in_serving(tmp_path):
    template = CHAT_TEMPLATE.replace(
        "message['content']",
        "(message['tool_calls'][0]['function']['arguments']['city'] "
        "if message['tool_calls'] else message['content'])",
    )
    tokenizer = Tokenizer.load(write_byte_level(tmp_path, template))
    call = {"type": "function", "function": {"name": "look", "arguments": '{"city": "over"}'}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    (example,) = read({"messages": messages}, tokenizer)
    text = tokenizer.decode(example.tokens.tolist(), skip_special_tokens=False)
    assert "system\nbe brief" in text
    assert text.endswith("assistant\nover<|im_end|>")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (line({"text": "a"}), "needs messages, or prompt and completion; prompt is no text"),
        (line({"prompt": "a", "completion": 3}), "completion is no text"),
        (line({"prompt": "", "completion": "a"}), "the prompt has no tokens"),
        (line({"messages": "hello"}), "messages is not a list"),
        (line({"messages": CHAT[:2]}), "no assistant turn"),
        (line({"messages": [{"content": "a"}]}), r"messages\[0\]: role is missing"),
        (line({"messages": [{"role": "user"}]}), r"messages\[0\]: content is missing"),
        (line({"messages": CHAT[:3], "tools": {}}), "tools is not a list"),
        (
            line({"messages": [*CHAT[:2], {**CHAT[2], "tool_calls": ["x"]}]}),
            r"messages\[2\]: tool_calls",
        ),
        (line({"prompt": "a " * 300, "completion": "b"}), "data.max_length is 200"),
    ],
)
def test_bad_lines_are_named(tokenizer, raw, message):
    with pytest.raises(DataError, match=rf"^data.jsonl:7: .*{message}"):
        read_line(raw, tokenizer, 200, "data.jsonl:7")


def test_bad_lines_are_an_error_or_counted(tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    good = json.dumps({"messages": CHAT[:3]})
    path.write_text(f"{good}\n\nnonsense\n{good}\n{{}}\n")

    def read_all(on_bad_line):
        return read_dataset([str(path)], tokenizer, max_length=200, on_bad_line=on_bad_line)

    with pytest.raises(DataError, match=r"data.jsonl:3: not valid JSON"):
        read_all("error")
    dataset = read_all("skip")
    assert [example.source for example in dataset.examples] == [f"{path}:1", f"{path}:4"]
    assert dataset.num_bad_lines == 2
    assert [text.split(": ")[0] for text in dataset.bad_lines] == [f"{path}:3", f"{path}:5"]


def test_files_without_examples_and_missing_files(tokenizer, tmp_path):
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(DataError, match="no examples"):
        read_dataset([empty], tokenizer, max_length=9, on_bad_line="skip")
    with pytest.raises(DataError, match=r"nowhere.jsonl: cannot be read: No such file"):
        read_dataset(["nowhere.jsonl"], tokenizer, max_length=9, on_bad_line="skip")
