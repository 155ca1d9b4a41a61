import json
import subprocess
import sys

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models

from pshare_jax.errors import CheckpointError, RequestError
from pshare_jax.text.tokenizer import Tokenizer
from tests.text.tiny import write_byte_level

MESSAGES = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]


def test_encodes_special_tokens_of_a_text_as_one_id(byte_level):
    token_ids = byte_level.encode("<|im_start|>user")
    assert token_ids[0] == 1
    assert byte_level.token_string(1) == "<|im_start|>"
    assert byte_level.special_ids == {0, 1, 2}
    assert byte_level.vocab_size == byte_level.encode("日本")[0] + 1


def test_end_tokens_come_from_generation_config_else_from_the_tokenizer(byte_level, sentencepiece):
    assert byte_level.eos_token_ids == (2, 0)
    assert sentencepiece.eos_token_ids == (2,)


def test_end_tokens_that_no_token_has_end_nothing(tmp_path, byte_level):
    """A mask of what may come would have no place for them."""
    folder = write_byte_level(tmp_path)
    ends = [2, 99_999, -1]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    assert Tokenizer.load(folder).eos_token_ids == (2,)
    assert byte_level.of_module(folder).eos_token_ids == (2, 0)


def test_a_malformed_end_token_is_refused(tmp_path):
    folder = write_byte_level(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": "2"}))
    with pytest.raises(CheckpointError, match="eos_token_id must be an integer"):
        Tokenizer.load(folder)


def test_token_text_names_parts_of_characters(byte_level):
    head = byte_level.encode("\U0001f9ff")[0]
    assert byte_level.token_bytes(head) == b"\xf0\x9f"
    assert byte_level.token_text(head) == "bytes:\\xf0\\x9f"
    assert byte_level.token_text(byte_level.encode("the")[0]) == "the"
    assert byte_level.token_bytes(10**6) == b""
    assert byte_level.token_string(10**6) is None


@pytest.mark.parametrize("text", ["", "hello", "the " * 500, "日本" * 30, "\x00" * 99])
def test_min_tokens_never_exceeds_the_number_of_tokens(byte_level, sentencepiece, text):
    for tokenizer in (byte_level, sentencepiece):
        assert tokenizer.min_tokens(text) <= len(tokenizer.encode(text))
    assert byte_level.min_tokens("x" * 10_000) > 400


def test_lone_surrogates_are_a_request_error(byte_level):
    with pytest.raises(RequestError, match="not valid Unicode"):
        byte_level.encode("a\ud800b")


def test_training_settings_of_the_file_do_not_cut_or_pad_prompts(tmp_path):
    folder = write_byte_level(tmp_path)
    file = folder / "tokenizer.json"
    fast = FastTokenizer.from_file(str(file))
    fast.enable_truncation(3)
    fast.enable_padding(length=64)
    fast.save(str(file))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(tokenizer.encode("the quick brown fox")) == "the quick brown fox"


def test_chat_template_is_rendered_with_tools_and_variables(byte_level):
    text = byte_level.apply_chat_template(MESSAGES)
    assert text == (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    text = byte_level.apply_chat_template(
        MESSAGES[:1],
        tools=[{"name": "f"}],
        add_generation_prompt=False,
        template_kwargs={"mood": "calm"},
    )
    assert text == '<|im_start|>system\nbe kind<|im_end|>\ntools: [{"name": "f"}]\nmood: calm\n'


@pytest.mark.parametrize(
    "name", ["messages", "conversation", "tools", "tokenize", "chat_template", "self"]
)
def test_template_variables_cannot_replace_the_request(byte_level, name):
    with pytest.raises(RequestError, match=name) as error:
        byte_level.apply_chat_template(MESSAGES, template_kwargs={name: "x"})
    assert error.value.param == "chat_template_kwargs"


def test_a_checkpoint_without_template_says_so(sentencepiece):
    assert not sentencepiece.has_chat_template
    with pytest.raises(RequestError, match="no chat template"):
        sentencepiece.apply_chat_template(MESSAGES)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "append"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    ],
)
def test_a_template_that_refuses_or_escapes_is_a_request_error(tmp_path, template, reason):
    tokenizer = Tokenizer.load(write_byte_level(tmp_path, template))
    with pytest.raises(RequestError, match=f"chat template cannot render.*{reason}"):
        tokenizer.apply_chat_template(MESSAGES)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(CheckpointError, match="not a readable tokenizer"):
        Tokenizer.load(tmp_path)


def test_an_unsupported_decoder_is_named(tmp_path):
    tokenizer = FastTokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="WordPiece"):
        Tokenizer.load(tmp_path)


def test_loading_says_nothing_and_needs_no_torch(tmp_path):
    folder = write_byte_level(tmp_path)
    program = (
        "import sys; from pshare_jax.text.tokenizer import Tokenizer; "
        f"t = Tokenizer.load({str(folder)!r}); "
        "assert t.encode('hello'); assert 'jax' not in sys.modules"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
