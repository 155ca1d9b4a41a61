"""Which decode modules have come and gone while a cluster runs, as all its processes come to know.

Each process has the table, and tells others of what is newer in its own. Of two entries for a name
the later one holds, everywhere: so it does not matter who hears of what first, and who was away
when a module went does not bring it back. What the table does not name is as configured.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import msgspec

from pshare_jax.config import Reasoning


class ModuleEntry(msgspec.Struct, frozen=True):
    """What is served under a name since `version`.

    Args:
        version: the greater one holds; nanoseconds of the clock of who has made the entry.
        id: of the model, see `ModelSpec.name`; empty is that nothing is served.
        folder: the module's checkpoint, as all hosts see it.
        weights: fingerprint of the weights that were there.
        tool_parser: see `ModelEntry`; all frontends read and write calls alike.
        reasoning: likewise.
    """

    version: int
    id: str = ""
    folder: str = ""
    weights: str = ""
    tool_parser: str = "auto"
    reasoning: Reasoning = "auto"


class ModuleTable:
    """The entries by name. Belongs to one thread at a time."""

    def __init__(self) -> None:
        self.entries: dict[str, ModuleEntry] = {}

    def merge(self, entries: Mapping[str, ModuleEntry]) -> dict[str, ModuleEntry]:
        """Takes in what another process has; what of that was news."""
        news = {
            name: entry
            for name, entry in entries.items()
            if name not in self.entries or self.entries[name].version < entry.version
        }
        self.entries.update(news)
        return news

    def next_version(self, name: str) -> int:
        """For an entry that is to hold from now on."""
        known = self.entries.get(name)
        return max(time.time_ns(), 0 if known is None else known.version + 1)

    def holds(self, id: str) -> bool:
        """Whether a model is served under some name."""
        return any(entry.id == id for entry in self.entries.values())
