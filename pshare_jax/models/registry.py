"""The families of models, and Hugging Face's `config.json` -> `ModelConfig` and back.

Reads what transformers 4 writes (`rope_theta`, `rope_scaling`) and what transformers 5 writes
(`rope_parameters`). A field that is absent has transformers' default for its architecture. A value
that the decoder cannot compute is an error here rather than wrong logits later.

A package of somebody else adds families by entry points of the group `pshare_jax.families`: the
name of an architecture, and an instance of `family.Family`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pshare_jax.errors import CheckpointError
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.family import Family
from pshare_jax.models.hf_fields import Fields
from pshare_jax.models.text_part import WRAPPERS, text_config

ENTRY_POINTS = "pshare_jax.families"

_BUILT_IN = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "mixtral": "mixtral",
    "qwen3_moe": "qwen3_moe",
    "phi3": "phi3",
    "smollm3": "smollm3",
    "granite": "granite",
    "olmo2": "olmo2",
    "gpt_oss": "gpt_oss",
}
"""Architecture: the file of its family. Files are read when they are asked for."""


@functools.cache
def family(architecture: str) -> Family:
    """The family of `ModelConfig.architecture`.

    Raises:
        CheckpointError: there is none.
    """
    if (file := _BUILT_IN.get(architecture)) is not None:
        return importlib.import_module(f"pshare_jax.models.families.{file}").FAMILY
    for point in _entry_points():
        if point.name == architecture:
            return point.load()
    known = ", ".join(architectures())
    raise CheckpointError(f"architecture {architecture!r} is not known; known are {known}")


def architectures() -> tuple[str, ...]:
    """The names of all families."""
    return (*_BUILT_IN, *(point.name for point in _entry_points()))


def families() -> Iterator[Family]:
    """All families."""
    return map(family, architectures())


@functools.cache
def _entry_points() -> importlib.metadata.EntryPoints:
    # All packages that are installed are looked through.
    return importlib.metadata.entry_points(group=ENTRY_POINTS)


def language_model(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `config.json` of the language model in a checkpoint that may read images too."""
    return text_config(hf, {known.model_type: known.hf_architectures[0] for known in families()})


def family_of_hf(hf: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face `config.json`; where it names no class, by its `model_type`.

    Raises:
        CheckpointError: its `architectures` is none that is supported.
    """
    names = hf.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    by_name = {hf_name: known for known in families() for hf_name in known.hf_architectures}
    if names is None and isinstance(kind := hf.get("model_type"), str):
        by_type = {known.model_type: known for known in families()}
        if kind in by_type:
            return by_type[kind]
    if not isinstance(name, str) or name not in by_name:
        raise CheckpointError(
            f"config.json: architectures is {reprlib.repr(names)}; supported are "
            f"{_shortly(list(by_name))}, and the text part of {_shortly(WRAPPERS)}"
        )
    return by_name[name]


def _shortly(names: Sequence[str]) -> str:
    """The names of classes, of which the first alone says how they end."""
    ends = ("ForCausalLM", "ForConditionalGeneration")
    short = (name.removesuffix(ends[0]).removesuffix(ends[1]) for name in names[1:])
    return ", ".join((names[0], *short))


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The decoder that a Hugging Face `config.json` (parsed) describes.

    Raises:
        CheckpointError: names the field that is missing, of the wrong type or not supported.
    """
    hf = language_model(hf)
    return family_of_hf(hf).config_from_hf(Fields(hf))


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """A `config.json` that transformers 4 and 5 load as this decoder.

    Token ids and the dtype are not part of `ModelConfig`: the caller adds them.

    Raises:
        CheckpointError: names a field that the Hugging Face architecture cannot express.
    """
    hf = family(config.architecture).config_to_hf(config)
    back = config_from_hf(hf)
    for field in dataclasses.fields(ModelConfig):
        if getattr(back, field.name) != getattr(config, field.name):
            raise CheckpointError(
                f"{field.name}={getattr(config, field.name)!r} cannot be expressed in the "
                f"config.json of a {hf['architectures'][0]}"
            )
    return hf
