"""The study in two minutes: a tiny base with random weights, and a task that it can learn.

A prompt has one capital letter among small ones; the answer is another letter, a fixed one for
each. A module must find the capital in the KV that it reads. The base knows nothing; what an
ordinary fine-tune learnt to look for in its own KV is not where it was in the base's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pshare_jax.convert.orbax import write_prefill
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.decoder import init_weights
from pshare_jax.study.config import SHARES, Runs, StudyConfig, TaskConfig

TASK = "lookup"
_CAPITALS = "ABCDEFGHIJKLMNOP"
_SMALL = "abcdefghijklmnop"
_LETTERS = 14
_SHIFT = 3
_END = "<|end|>"
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + ':' + message['content'] }}"
    f"{{{{ '{_END}' }}}}{{% endfor %}}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
_MODEL = ModelConfig(
    architecture="llama",
    vocab_size=257,
    hidden_size=48,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=128,
)


def lookups(seed: int, size: int) -> Iterator[tuple[str, str]]:
    """`size` questions and answers; the same ones for the same seed."""
    rng = random.Random(seed)
    for _ in range(size):
        letters = [rng.choice(_SMALL) for _ in range(_LETTERS)]
        place = rng.randrange(len(_CAPITALS))
        letters[rng.randrange(_LETTERS)] = _CAPITALS[place]
        yield "".join(letters), _CAPITALS[(place + _SHIFT) % len(_CAPITALS)]


def write_base(folder: Path) -> None:
    """Writes a base of 30,000 random weights whose tokens are bytes.

    Raises:
        CheckpointError: `folder` exists.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_END])
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": (
            f'{{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "{_END}"}}'
        ).encode(),
        "chat_template.jinja": _TEMPLATE.encode(),
    }
    write_prefill(folder, _MODEL, init_weights(_MODEL, 0), files)


def quick_study(folder: Path) -> StudyConfig:
    """The study of `lookup` in `folder`, where its base is made if it is not there."""
    base = folder / "base"
    if not base.is_dir():
        write_base(base)
    rate = [3e-3]
    return StudyConfig(
        base=str(base),
        folder=str(folder),
        results=str(folder / "results"),
        tasks=[TaskConfig(TASK, train=9600, validation=100, test=400, max_tokens=2)],
        runs=[
            Runs(TASK, "full", 9600, rate, test=True, shares=list(SHARES)),
            Runs(TASK, "prefillshare", 9600, rate, test=True, shares=list(SHARES)),
            Runs(TASK, "lora", 9600, [1e-2], test=True),
        ],
        batch_size=32,
        max_length=64,
        eval_batch_size=100,
    )
