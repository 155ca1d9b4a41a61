"""`python -m pshare_jax.demo`: serve a small model and three decode modules, and play a session.

`make demo` makes the checkpoints first.
"""

from __future__ import annotations

import asyncio
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

SHARED = Path("configs/serve/smollm2-135m.yaml")
ISOLATED = Path("configs/serve/smollm2-135m-isolated.yaml")


def main() -> int:
    """Runs the demo; returns the exit code: 2 outside of a checkout."""
    console = Console(highlight=False)
    if not SHARED.is_file():
        console.print(
            f"demo: there is no {SHARED} here: the demo runs in a checkout of pshare_jax, where "
            "`make demo` makes its checkpoints first",
            markup=False,
            soft_wrap=True,
        )
        return 2
    try:
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
