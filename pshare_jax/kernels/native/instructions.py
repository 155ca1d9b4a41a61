"""Instructions that a compiler may use: those of a CPU by name, and those of this one."""

from __future__ import annotations

import re

from pshare_jax.kernels.native.compiling import output_of

_MACRO = re.compile(r"#define (\w+) (\S+)")
_INSTRUCTIONS = re.compile(
    r"__(?:(S?SSE|AVX|FMA|F16C|GFNI|BMI|LZCNT|POPCNT|MOVBE|XOP|TBM|ADX)"
    r"(?!512VP2INTERSECT|512[EP]|5124)\w*__|ARM_FEATURE_\w+)"
)
"""Names of macros for what compilers use by themselves. Not of what only a program that asks for it
uses: AMX, which `src/tile_check.h` looks for before, parts of AVX512 that few CPUs ever had though
compilers name them, and what has nothing to do with computing."""


def lacking(compiler: str, march: str) -> list[str]:
    """Instructions that `-march=MARCH` has the compiler use, and that this CPU does not have.

    They are called as its macros are, such as `AVX512F`.

    Raises:
        NativeBuildError: the compiler fails, at a `march` that it does not know for example.
    """
    own = used(compiler, "native")
    return sorted(name.strip("_") for name in used(compiler, march) - own)


def used(compiler: str, march: str) -> set[str]:
    """Macros of the instructions that `-march=MARCH` has the compiler use."""
    text = output_of([compiler, f"-march={march}", "-dM", "-E", "-x", "c++", "/dev/null"])
    macros = dict(_MACRO.findall(text))
    return {name for name, v in macros.items() if v != "0" and _INSTRUCTIONS.fullmatch(name)}
