"""Typed configuration: a YAML file plus `--a.b=c` overrides. Unknown keys are errors."""

# PyYAML and jsonargparse say the types of their methods in part only.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import yaml

from pshare_jax.config import ServeConfig
from pshare_jax.errors import ConfigError
from pshare_jax.plain_data import is_object

T = TypeVar("T")


class _Yaml(yaml.SafeLoader):
    """YAML in which `on` and `off` are words, 1e-3 is a number, and dates are text."""


_RESOLVED_ANEW = {
    "tag:yaml.org,2002:bool",
    "tag:yaml.org,2002:float",
    "tag:yaml.org,2002:timestamp",
}
_Yaml.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in resolvers if tag not in _RESOLVED_ANEW]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(?i)^(?:true|false|yes|no)$"), list("tTfFyYnN")
)
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
        r"|^[-+]?\.(?i:inf)$|^\.(?i:nan)$"
    ),
    list("-+.0123456789"),
)


def _load_yaml(text: str) -> Any:
    value = yaml.load(text, Loader=_Yaml)
    # What a flag means by `{a, b}` or `a:` is text.
    is_text = is_object(value) and value and all(v is None for v in value.values())
    return text if is_text else value


jsonargparse.set_loader("yaml", _load_yaml, exceptions=(yaml.YAMLError,))


def build_parser(cls: type, prog: str, description: str) -> jsonargparse.ArgumentParser:
    """A parser for the dataclass `cls`: `--config FILE.yaml` and one flag for each field."""
    parser = jsonargparse.ArgumentParser(prog=prog, description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with the keys below")
    parser.add_class_arguments(cls)
    return parser


def load_config(cls: type[T], args: Sequence[str], prog: str, description: str = "") -> T:
    """Parses `args` (`--config file.yaml --a.b=c ...`) into an instance of the dataclass `cls`.

    Raises:
        ConfigError: an unreadable file, an unknown key or a value of the wrong type, named.
    """
    parser = build_parser(cls, prog, description)
    try:
        namespace = parser.instantiate(parser.parse_args(list(args)))
    except (argparse.ArgumentError, jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    return cls(**{f.name: namespace[f.name] for f in dataclasses.fields(cls)})  # type: ignore[arg-type]


def load_serve_config(source: str | Path, *overrides: str) -> ServeConfig:
    """Reads a serving configuration from the YAML file `source`, then applies `--a.b=c` flags."""
    return load_config(ServeConfig, [f"--config={source}", *overrides], prog="pshare_jax.serve")
