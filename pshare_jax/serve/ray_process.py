"""A process that an actor of Ray keeps, as the launcher has it."""

from __future__ import annotations

import contextlib
import logging
import signal
from typing import Any

from pshare_jax.serve.supervision import LOST

log = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0
"""That an actor which is there may take to answer."""


class RayProcess:
    """A process that an actor keeps, see `supervision.Process`.

    Args:
        ray: the module.
        actor: a `Keeper`.
        address: where the process listens.
        pid: on its host.
    """

    def __init__(self, ray: Any, actor: Any, address: str, pid: int):
        self.address = address
        self.pid = pid
        self._ray = ray
        self._actor = actor

    def wait_until_ready(self) -> bool:
        """See `Process.wait_until_ready`."""
        try:
            return self._ray.get(self._actor.wait_until_ready.remote())
        except ray_errors(self._ray):
            return False

    def wait(self) -> int:
        """See `Process.wait`; its actor ends with it."""
        try:
            code = self._ray.get(self._actor.wait.remote())
        except ray_errors(self._ray) as error:
            log.warning(
                "the process at %s is not heard of any more: %s", self.address, last_line(error)
            )
            code = LOST
        end_actor(self._ray, self._actor)
        return code

    def terminate(self) -> None:
        """See `Process.terminate`."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """See `Process.kill`; one whose actor does not answer is given up with it."""
        if not self._send(signal.SIGKILL):
            end_actor(self._ray, self._actor)

    def _send(self, number: int) -> bool:
        if not self._ray.is_initialized():
            return False  # asked now, it would start a cluster of its own
        try:
            self._ray.get(self._actor.send.remote(int(number)), timeout=ANSWER_SECONDS)
        except ray_errors(self._ray):
            return False
        return True


def end_actor(ray: Any, actor: Any) -> None:
    """Ends an actor; its process goes on, if it has one."""
    if not ray.is_initialized():
        return
    with contextlib.suppress(*ray_errors(ray)):
        ray.kill(actor)


def ray_errors(ray: Any) -> tuple[type[Exception], ...]:
    """What calls of Ray raise when an actor, or Ray itself, is not there."""
    return (ray.exceptions.RayError, ConnectionError, ValueError)


def last_line(error: Exception) -> str:
    """The last line of an error that has come from another process with its traceback."""
    return str(error).strip().rpartition("\n")[2]
