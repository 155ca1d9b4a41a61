"""Which worker processes there are, where a name stands for all of them.

`dns:NAME:PORT` is every address that the name has, looked up again and again: the headless service
of a cluster's workers, which come and go as somebody scales them. A name server that does not
answer changes nothing, and who is linked is not given up because its address has gone: it drains.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Collection, Sequence

from pshare_jax.cluster.secret import split_address

DNS = "dns:"

LOOK_SECONDS = 2.0
"""Between two looks."""

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""Addresses, `HOST:PORT`, of a name; raises OSError."""


def check_workers(entries: Sequence[str]) -> None:
    """Checks that all are addresses, or names that stand for some.

    Raises:
        ConfigError: one is neither.
    """
    for entry in entries:
        split_address(entry.removeprefix(DNS))


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a name, sorted.

    Raises:
        OSError: it has none, or nobody could be asked.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    hosts = {str(address[0]) for *_, address in found}
    return sorted(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts)


class Discovery:
    """What a list of workers comes to.

    Args:
        entries: addresses, and names that stand for some.
        resolve: looks a name up.

    Attributes:
        fixed: addresses among the entries.
        problems: names that have no address now, and why.
    """

    def __init__(self, entries: Sequence[str], resolve: Resolve = resolve):
        self.fixed = [entry for entry in entries if not entry.startswith(DNS)]
        self._names = [entry for entry in entries if entry.startswith(DNS)]
        self._resolve = resolve
        self._known: dict[str, list[str]] = {}
        self.problems = dict.fromkeys(self._names, "it has not been looked up")

    @property
    def static(self) -> bool:
        """Whether no name is among them."""
        return not self._names

    async def look(self, linked: Collection[str]) -> list[str]:
        """All addresses of now.

        Args:
            linked: those that there is a link to.
        """
        problems: dict[str, str] = {}
        for name in self._names:
            host, port = split_address(name.removeprefix(DNS))
            try:
                found = await self._resolve(host, port)
            except (OSError, UnicodeError) as error:
                # What was known stays, until somebody knows better.
                problems[name] = getattr(error, "strerror", None) or str(error)
                continue
            staying = [a for a in self._known.get(name, ()) if a in linked and a not in found]
            self._known[name] = [*found, *staying]
        self.problems = {name: why for name, why in problems.items() if not self._known.get(name)}
        every = [*self.fixed, *(a for name in self._names for a in self._known.get(name, ()))]
        return list(dict.fromkeys(every))
