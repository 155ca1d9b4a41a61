import pytest

from pshare_jax.frontend.answers import AnswerReader, joined
from pshare_jax.frontend.reasoning import ReasoningSplitter
from pshare_jax.frontend.tool_calls.json_blocks import Hermes

CASES = [
    # (whether the prompt has opened the tag, text, thoughts, content)
    (False, "<think>\nI see.\n\nYes. \n</think>\n\nAnswer.", "I see.\n\nYes.", "Answer."),
    (False, "\n<think>a</think>b</think>", "a", "b</think>"),
    (False, "No thoughts <think>here</think>", "", "No thoughts <think>here</think>"),
    (False, "  spaces", "", "  spaces"),
    (False, "<thin", "", "<thin"),
    (False, "<think>cut off </th", "cut off </th", ""),
    (False, "<think>\n\n</think>\n\nAnswer", "", "Answer"),
    (True, "\nI see</think>Answer", "I see", "Answer"),
    (True, "cut off", "cut off", ""),
    (False, "", "", ""),
]


@pytest.mark.parametrize(("begun", "text", "thoughts", "content"), CASES)
def test_thoughts_are_split_off_however_the_text_is_cut(begun, text, thoughts, content):
    for size in range(1, len(text) + 2):
        splitter = ReasoningSplitter(begun)
        parts = [p for i in range(0, len(text), size) for p in splitter.push(text[i : i + size])]
        assert joined(parts + splitter.finish()) == (thoughts, content, [])


def test_calls_are_looked_for_after_the_thoughts_only():
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    text = f"<think>{call}?</think>\nI call.{call}"
    for size in (1, 7, len(text)):
        reader = AnswerReader(ReasoningSplitter(False), Hermes(["f"]))
        parts = [p for i in range(0, len(text), size) for p in reader.push(text[i : i + size])]
        parts += reader.finish()
        assert joined(parts) == (f"{call}?", "I call.", [("f", "{}")])
        assert reader.calls == 1


def test_one_call_only():
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    reader = AnswerReader(None, Hermes(["f"]), one_call=True)
    parts = reader.push(call + call + "end") + reader.finish()
    assert joined(parts) == ("", "end", [("f", "{}")])
    assert reader.calls == 1
