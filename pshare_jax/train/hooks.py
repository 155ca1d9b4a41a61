"""Functions of the user's that a configuration names: `module:function`."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pshare_jax.errors import ConfigError


def load_hook(path: str, key: str) -> Callable[..., Any]:
    """The function `module:function`; the working directory counts among the places of modules.

    Args:
        path: names it.
        key: the configuration's key that does, for messages.

    Raises:
        ConfigError: it cannot be imported, or is not there.
    """
    module_name, _, name = path.partition(":")
    try:
        module = _import(module_name)
    except Exception as error:  # a module can raise anything while it is imported
        raise ConfigError(
            f"{key}: {module_name} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ConfigError(f"{key}: {module_name} has no function {name}")
    return found


def hook_sha256(path: str, key: str) -> str:
    """Hash (hex) of the file that holds a hook: a run does not go on with other code.

    Raises:
        ConfigError: see `load_hook`; or it comes from no file.
    """
    function = load_hook(path, key)
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
        content = Path(str(file)).read_bytes()
    except (TypeError, OSError) as error:
        raise ConfigError(f"{key}: {path} comes from no file that can be read") from error
    return hashlib.sha256(content).hexdigest()


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        here = str(Path.cwd())
        if error.name != name.partition(".")[0] or here in sys.path:
            raise
        # A console script does not look there, as `python -m` does.
        sys.path.append(here)
        return importlib.import_module(name)
