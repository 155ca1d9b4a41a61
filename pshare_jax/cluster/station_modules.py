"""What a station asks of decode modules that come and go; `engine.hosted_modules` has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from pshare_jax.cluster import wire
from pshare_jax.cluster.modules import ModuleEntry
from pshare_jax.core.messages import Message


class StationModules(Protocol):
    """Decode modules that come and go, see `engine.hosted_modules`. Belongs to the station's loop.

    Attributes:
        broadcast: sends a frame to all frontends.
    """

    broadcast: Callable[[wire.Frame], None]

    @property
    def entries(self) -> Mapping[str, ModuleEntry]:
        """What has come and gone, by name."""
        ...

    def hosting(self) -> Iterable[wire.Frame]:
        """What of that is hosted here."""
        ...

    def hear(self, frontend: int, frame: wire.Load | wire.Retired | wire.Modules) -> None:
        """Takes in what a frontend says, by its incarnation."""
        ...

    def leave(self, frontend: int) -> None:
        """A frontend is not linked any more, and nothing that it had sent is left."""
        ...

    def lacks(self, message: Message, to: str) -> str:
        """The model that a sequence needs and a worker does not have, or nothing."""
        ...
