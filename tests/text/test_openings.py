"""How messages begin in the chat templates of common families, in token ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.trainers import BpeTrainer

from pshare_jax.core.split_rule import Invocation, LastMessage, LastTokens
from pshare_jax.errors import CertificateError, CheckpointError
from pshare_jax.text.openings import message_openings, split_rule
from pshare_jax.text.tokenizer import Tokenizer
from tests.text.tiny import write_byte_level

QUESTION = {"role": "user", "content": "What is it?"}
ANSWER = {"role": "assistant", "content": "A boat."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "type": "function",
            "id": "call00001",
            "function": {"name": "find", "arguments": {"q": "boat"}},
        }
    ],
}
RESULT = {"role": "tool", "name": "find", "tool_call_id": "call00001", "content": "found"}

LLAMA_3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}"
    "{% if m.tool_calls %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' + "
    '\'{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' + '
    "(m.tool_calls[0].function.arguments | tojson) + '}<|eot_id|>' }}"
    "{% elif m.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' + "
    "(m.content | tojson) + '<|eot_id|>' }}"
    "{% else %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + (m.content | trim) + "
    "'<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
GEMMA = (
    "{{ '<bos>' }}"
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + "
    "(m.content | trim) + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ '<s>' }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.tool_calls %}"
    "{{ '[TOOL_CALLS] [' + (m.tool_calls[0].function | tojson) + ']</s>' }}"
    "{% elif m.role == 'tool' %}"
    "{{ '[TOOL_RESULTS] {\"content\": ' + (m.content | tojson) + '}[/TOOL_RESULTS]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + '</s>' }}"
    "{% else %}{{ raise_exception('no ' + m.role) }}{% endif %}{% endfor %}"
)
QWEN = (
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + "
    "'\n</tool_response><|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '\n<tool_call>\n' + (call.function | tojson) + "
    "'\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = {
    LLAMA_3: ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    GEMMA: ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    QWEN: ["<|im_start|>", "<|im_end|>"],
}
CORPUS = [
    "user assistant model system tool ipython\n\n\n\n",
    "\n\nx\n\n \n\nWhat is it? A boat.\n\n",
]


def byte_level(folder: Path, template: str, special: list[str]) -> Tokenizer:
    """BPE as GPT-2's, but that newlines merge with newlines that follow."""
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=330,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=special,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return write(folder, tokenizer, template)


def sentencepiece(folder: Path, template: str) -> Tokenizer:
    """As Mistral's first: `[INST]` is text, and a space merges with the word that follows."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [*"▁[]/INSTWhatiouOLREC_A", "▁[", "IN", "ST", "INST", "▁W", "▁A"]
    merges = [("▁", "["), ("I", "N"), ("S", "T"), ("IN", "ST"), ("▁", "W"), ("▁", "A")]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = FastTokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    return write(folder, tokenizer, template)


def write(folder: Path, tokenizer: FastTokenizer, template: str) -> Tokenizer:
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(folder)


def read_itself(tokenizer: Tokenizer, messages: list[dict]) -> str:
    """What a module with the rule `last-message` reads of a prompt, as text."""
    rule = LastMessage(message_openings(tokenizer))
    text = tokenizer.apply_chat_template(messages)
    prompt = tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.decode(prompt[rule.split(prompt).covered :], skip_special_tokens=False)


def texts(tokenizer: Tokenizer) -> list[str]:
    ids = message_openings(tokenizer)
    return [tokenizer.decode(opening, skip_special_tokens=False) for opening in ids]


def test_chatml(tmp_path):
    tokenizer = Tokenizer.load(write_byte_level(tmp_path / "tokenizer"))
    assert texts(tokenizer) == ["<|im_start|>user\n", "<|im_start|>tool\n"]
    last = "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    assert read_itself(tokenizer, [QUESTION]) == last
    assert read_itself(tokenizer, [QUESTION, ANSWER, QUESTION]) == last
    assert read_itself(tokenizer, [QUESTION, CALL, RESULT]) == (
        "<|im_start|>tool\nfound<|im_end|>\n<|im_start|>assistant\n"
    )


def test_llama_3(tmp_path):
    tokenizer = byte_level(tmp_path, LLAMA_3, SPECIAL[LLAMA_3])
    assert texts(tokenizer) == [
        "<|start_header_id|>user<|end_header_id|>\n\n",
        '<|start_header_id|>ipython<|end_header_id|>\n\n"',
    ]
    assert read_itself(tokenizer, [QUESTION, ANSWER, QUESTION]) == (
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert read_itself(tokenizer, [QUESTION, CALL, RESULT]) == (
        '<|start_header_id|>ipython<|end_header_id|>\n\n"found"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_gemma(tmp_path):
    """Neither system nor tool messages."""
    tokenizer = byte_level(tmp_path, GEMMA, SPECIAL[GEMMA])
    assert texts(tokenizer) == ["<start_of_turn>user\n"]
    last = "<start_of_turn>user\nWhat is it?<end_of_turn>\n<start_of_turn>model\n"
    assert read_itself(tokenizer, [QUESTION]) == last
    assert read_itself(tokenizer, [QUESTION, ANSWER, QUESTION]) == last


def test_mistral(tmp_path):
    """The space after `[INST]` belongs to the word that follows, so the opening ends before it."""
    tokenizer = sentencepiece(tmp_path, MISTRAL)
    user, tool = message_openings(tokenizer)
    assert [tokenizer.token_string(i) for i in user] == ["▁[", "INST", "]"]
    assert tokenizer.decode(tool) == '[TOOL_RESULTS] {"content": "'
    read = read_itself(tokenizer, [QUESTION, ANSWER, QUESTION])
    assert read.strip() == "[INST] What is it? [/INST]"
    assert read_itself(tokenizer, [QUESTION, CALL, RESULT]).strip() == (
        '[TOOL_RESULTS] {"content": "found"}[/TOOL_RESULTS]'
    )


def test_qwen(tmp_path):
    """A tool's answer is written as a user's; the last answer is written unlike earlier ones."""
    tokenizer = byte_level(tmp_path, QWEN, SPECIAL[QWEN])
    # This template does not trim: a newline that follows would merge with the opening's.
    assert texts(tokenizer) == ["<|im_start|>user"]
    assert read_itself(tokenizer, [QUESTION, CALL, RESULT]) == (
        "<|im_start|>user\n<tool_response>\nfound\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("content", ["\n\nWhat?", " What?", "", "<|im_start|>", "日本"])
def test_whatever_the_message_its_opening_is_found(tmp_path, content):
    tokenizer = byte_level(tmp_path, QWEN, SPECIAL[QWEN])
    read = read_itself(tokenizer, [QUESTION, ANSWER, {"role": "user", "content": content}])
    assert read == f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        # Any role begins alike.
        (
            "{% for m in messages %}{{ '<|im_start|>' + m.content + '\n' }}{% endfor %}",
            r"do not begin each user message and nothing else",
        ),
        # Nothing is written before a message.
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "does not end as it does when"),
        # Its opening merges with what stands before.
        (
            "{% for m in messages %}{{ m.content + ('' if loop.last else '\n') }}"
            "{{ '\n' if m.role == 'assistant' else '' }}{% endfor %}",
            "a user message does not begin at the border of a token",
        ),
        ("{{ raise_exception('never') }}", "never"),
        ("{{ '<|im_start|>' + messages[0].content }}", "it leaves messages out"),
    ],
)
def test_other_templates_are_refused(tmp_path, template, reason):
    tokenizer = byte_level(tmp_path, template, ["<|im_start|>"])
    with pytest.raises(CheckpointError, match=f"last-message cannot be derived .*{reason}"):
        message_openings(tokenizer)


def test_without_a_chat_template(tmp_path):
    tokenizer = Tokenizer.load(write_byte_level(tmp_path / "tokenizer", chat_template=None))
    with pytest.raises(CheckpointError, match="last-message needs a chat template"):
        message_openings(tokenizer)


def test_what_a_configuration_asks_for(tmp_path):
    tokenizer = Tokenizer.load(write_byte_level(tmp_path / "tokenizer"))

    def never() -> Tokenizer:
        raise AssertionError("the tokenizer does not matter")

    assert split_rule(3, never) == LastTokens(3)
    assert split_rule({"invocation": [5, 6]}, never) == Invocation((5, 6))
    expected = LastMessage(message_openings(tokenizer))
    assert split_rule("last-message", lambda: tokenizer) == expected
    with pytest.raises(CertificateError, match="tail is 0"):
        split_rule(0, never)
