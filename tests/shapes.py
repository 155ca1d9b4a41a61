"""Checks the shapes that functions of `kernels` and `models` are annotated with, where tests ask.

The annotations are text that nothing evaluates: whoever serves neither imports jaxtyping nor
checks anything. Here they are evaluated, and the functions replaced by ones that check.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import beartype
import jax
import jaxtyping

from pshare_jax.runtime import programs

PACKAGES = ("pshare_jax.kernels.", "pshare_jax.models.")
_JITTED = jax.jit(lambda: None)
NAMES = {**vars(jaxtyping), "Array": jax.Array}


def annotated() -> dict[str, tuple[Any, str, Callable[..., Any]]]:
    """What has shapes in its annotations, by its full name: its owner, its name there, and it."""
    found = {}
    for module in [m for name, m in sorted(sys.modules.items()) if name.startswith(PACKAGES)]:
        classes = [c for c in vars(module).values() if inspect.isclass(c)]
        for owner in (module, *(c for c in classes if c.__module__ == module.__name__)):
            for name, function in vars(owner).items():
                plain = _without_jit(function)
                own = inspect.isfunction(plain) and plain.__module__ == module.__name__
                if own and _shapes(plain):
                    full = f"{module.__name__}.{plain.__qualname__}"
                    found[full.removeprefix("pshare_jax.")] = (owner, name, function)
    return found


def checking(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a function that checks its annotated shapes, and those of its result.

    One that is under jit by itself is not: what has been traced before would not be checked.
    """
    function = _without_jit(function)
    copy = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__qualname__ = function.__qualname__
    copy.__module__ = function.__module__
    copy.__annotations__ = {
        name: eval(text, dict(NAMES)) for name, text in _shapes(function).items()
    }
    return jaxtyping.jaxtyped(copy, typechecker=beartype.beartype)


@contextmanager
def checked() -> Iterator[set[str]]:
    """All of them check while the block lasts; gives the names of those that were called."""
    called: set[str] = set()
    patches = []
    for full, (owner, name, function) in annotated().items():
        new = _noted(full, checking(function), called)
        patches.append(mock.patch.object(owner, name, new))
        # Whoever has imported it by name.
        patches += [
            mock.patch.object(module, name, new)
            for module_name, module in list(sys.modules.items())
            if module_name.startswith("pshare_jax.")
            and module is not owner
            and vars(module).get(name) is function
        ]
    for patch in patches:
        patch.start()
    _forget_programs()
    try:
        yield called
    finally:
        for patch in reversed(patches):
            patch.stop()
        _forget_programs()


def _forget_programs() -> None:
    """What engines of this process keep under jit has the functions of when it was made."""
    for kept in vars(programs).values():
        if hasattr(kept, "cache_clear"):
            kept.cache_clear()


def _without_jit(function: Any) -> Any:
    return inspect.unwrap(function) if isinstance(function, type(_JITTED)) else function


def _shapes(function: Callable[..., Any]) -> dict[str, str]:
    """The annotations that have shapes."""
    return {
        name: text
        for name, text in function.__annotations__.items()
        if isinstance(text, str) and "[Array, " in text
    }


def _noted(name: str, function: Callable[..., Any], called: set[str]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        called.add(name)
        return function(*args, **kwargs)

    return call
