"""The form in which chat templates get a tool: that of OpenAI's API."""

from __future__ import annotations

from typing import Any

from pshare_jax.plain_data import is_object


def in_openai_form(tool: Any) -> Any:
    """`{"type": "function", "function": {...}}` for a bare function, as datasets such as BFCL have
    them; anything else as it is. A data file and a request must give the same prompt."""
    if is_object(tool) and "function" not in tool and isinstance(tool.get("name"), str):
        return {"type": "function", "function": tool}
    return tool
