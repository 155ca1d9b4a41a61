"""What the documentation's site adds to its pages: their order, and names of what is no page."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

SECTIONS = {
    "Serve": [
        "serving.md",
        "models.md",
        "converting.md",
        "kv-tiers.md",
        "ui.md",
        "security.md",
        "reliability.md",
        "cluster.md",
        "deploying.md",
    ],
    "Train": ["training.md", "evaluation.md"],
    "Measure": ["performance.md", "benchmarks.md", "hardware.md", "accelerators.md"],
    "Reference": [
        "api/engine.md",
        "api/config.md",
        "api/training.md",
        "api/models.md",
        "api/kernels.md",
        "api/errors.md",
    ],
    "Design": ["architecture.md", "tree.md"],
}
"""Pages by section; one that is not named here comes under `Also`."""

_LINK = re.compile(r"\[([^\]]*)\]\(([^):#\s]+)(#[^)\s]*)?\)")
log = logging.getLogger("mkdocs.site_hooks")


def on_config(config: Any) -> Any:
    """Gives each page its place."""
    root = Path(config.docs_dir)
    pages = sorted(str(path.relative_to(root)) for path in root.rglob("*.md"))
    decisions = [page for page in pages if page.startswith("decisions/")]
    known = {"index.md", *decisions, *(page for pages in SECTIONS.values() for page in pages)}
    nav: list[Any] = ["index.md"]
    nav += [{title: pages} for title, pages in SECTIONS.items()]
    nav.append({"Decisions": sorted(decisions, key=lambda page: (page[-9:] != "README.md", page))})
    if others := [page for page in pages if page not in known]:
        nav.insert(-2, {"Also": others})
    config.nav = nav
    return config


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Links that leave the folder, or lead to one, become the names of what they lead to."""
    del files
    root = Path(config.docs_dir).resolve()
    here = Path(page.file.abs_src_path).parent

    def name(link: re.Match[str]) -> str:
        text, target, _ = link.groups()
        path = (here / target).resolve()
        if not path.exists():
            log.warning("%s: %s does not exist", page.file.src_path, target)
        if path.is_relative_to(root) and not path.is_dir():
            return link[0]
        return f"{text} (`{path.relative_to(root.parent)}`)"

    return _LINK.sub(name, markdown)
