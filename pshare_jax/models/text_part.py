"""The text part of checkpoints that read images too: their configuration and their tensors.

What is imported is the language model alone, which answers as the whole does where a prompt has no
image. It is exported as what it is, a model of text.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from pshare_jax.errors import CheckpointError

WRAPPERS = (
    "Gemma3ForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
)
"""transformers' classes with a `text_config`."""

_TEXT = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)
"""How names begin, as transformers 4 and 5 write them, and what a language model alone has."""

_IMAGES = ("vision_tower.", "multi_modal_projector.")


def text_config(hf: Mapping[str, Any], architectures: Mapping[str, str]) -> Mapping[str, Any]:
    """The configuration of the language model; `hf` itself if it is of nothing else.

    Args:
        hf: a parsed `config.json`.
        architectures: transformers' class of a language model by its `model_type`.

    Raises:
        CheckpointError: a language model that is not among them.
    """
    names, text = hf.get("architectures"), hf.get("text_config")
    name = names[0] if isinstance(names, list) and names else None
    if name not in WRAPPERS or not isinstance(text, Mapping):
        return hf
    kind = text.get("model_type")
    if not isinstance(kind, str) or kind not in architectures:
        raise CheckpointError(
            f"config.json: text_config.model_type of a {name} is {reprlib.repr(kind)}; supported "
            f"are {', '.join(architectures)}"
        )
    outer = ("tie_word_embeddings", "quantization_config", "dtype", "torch_dtype", "eos_token_id")
    return {
        **text,
        # What the whole says of these counts for the part.
        **{field: hf[field] for field in outer if hf.get(field) is not None},
        "architectures": [architectures[kind]],
    }


def text_names(names: Iterable[str]) -> dict[str, str]:
    """The names that tensors have in the language model alone; without those of the image part.

    Names of a checkpoint that is a language model alone stay as they are.
    """
    names = list(names)
    if not any(name.startswith(prefix) for name in names for prefix, _ in _TEXT):
        return {name: name for name in names}
    return {
        name: _text_name(name)
        for name in names
        if not name.removeprefix("model.").startswith(_IMAGES)
    }


def _text_name(name: str) -> str:
    for prefix, plain in _TEXT:
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name
