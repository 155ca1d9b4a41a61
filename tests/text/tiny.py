"""Tokenizer folders small enough to be made on the spot."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if tools %}{{ 'tools: ' + (tools | tojson) + '\n' }}{% endif %}"
    "{% if mood is defined %}{{ 'mood: ' + mood + '\n' }}{% endif %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "the quick brown fox jumps over the lazy dog and then the dog sleeps all day long",
    "user assistant system hello world, how are you? I am well. one two three four five",
    "naïve café über straße 你好世界 🙂👩‍👩‍👧 e\u0301",
]


def write_byte_level(folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """A byte-level BPE of about 400 tokens with ChatML's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # Added tokens are not spelt in the byte alphabet: a space stays a space.
    tokenizer.add_tokens(
        [AddedToken("a b", normalized=False), AddedToken("日本", normalized=False)]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "bos_token": "<|endoftext|>",
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    return _write(folder, tokenizer, config, {"eos_token_id": [2, 0]})


def write_words(folder: Path) -> Path:
    """A vocabulary of 100 words, for models whose embedding is small."""
    words = {"<unk>": 0, **{f"w{i}": i for i in range(1, 100)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w1"}
    return _write(folder, tokenizer, config, {"eos_token_id": [1]})


def write_sentencepiece(folder: Path) -> Path:
    """SentencePiece's way: a leading space is added and stripped, unknown bytes are tokens."""
    tokenizer = _sentencepiece()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    return _write_sentencepiece(folder, tokenizer)


def write_metaspace(folder: Path) -> Path:
    """The same, as newer files have it: the space is added at the beginning of a text alone."""
    tokenizer = _sentencepiece()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return _write_sentencepiece(folder, tokenizer)


def _sentencepiece() -> Tokenizer:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["\u2581", "h", "i", "\u2581h", "\u2581hi", "é"]
    return Tokenizer(
        models.BPE(
            {word: index for index, word in enumerate(words)},
            [("\u2581", "h"), ("\u2581h", "i")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )


def _write_sentencepiece(folder: Path, tokenizer: Tokenizer) -> Path:
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    return _write(folder, tokenizer, config, None)


def _write(folder: Path, tokenizer: Tokenizer, config: dict, generation: dict | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder
