"""Prompts of a prefill core in a pool that rows use, too: whose pages others may take."""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from pshare_jax.core.messages import Withdrawn
from pshare_jax.core.prefill import PrefillCore
from pshare_jax.core.prefill_task import PrefillTask
from pshare_jax.core.sequences import Moved, Sequence
from pshare_jax.core.shares import HasSequence


class PoolPrompts:
    """What a prefill core holds of a pool, and how it gives that up.

    Args:
        prefill: the core.
    """

    def __init__(self, prefill: PrefillCore):
        self._prefill = prefill

    @property
    def hold_pages(self) -> bool:
        """Whether any sequence holds pages there."""
        core = self._prefill
        elsewhere = core.borrowing.waits or (core.store and core.store.holds_pages)
        return bool(core.chunks.active or core.held or elsewhere)

    def holders(self, inside: Collection[int]) -> list[HasSequence]:
        """Tasks that hold pages and can start anew, and runs that are fetched for tasks.

        Sequences `inside` the decode worker have their pages from there too, and keep them.
        """
        core, store = self._prefill, self._prefill.store
        looked_for, runs = (store.holders, store.runs) if store is not None else ((), ())
        tasks = (*core.chunks.active, *core.held.tasks(), *looked_for)
        found = (
            task
            for task in tasks
            if task.pages and not task.moved and task.sequence.id not in inside
        )
        return [*found, *runs]

    def give_way(self, task: HasSequence) -> bool:
        """Takes the pages of one of `holders`, unless they are in use at this moment.

        What it has computed stays in the index as long as there is room.
        """
        core = self._prefill
        if not isinstance(task, PrefillTask):
            return self._run_gives_way(task)
        if task.planned is not None or core.held.is_offered(task):
            return False
        if task in core.chunks.active:
            core.chunks.active.remove(task)
        elif core.store is None or core.store.abort(task.sequence.id) is None:
            core.held.give_way(task)
            core.outbox.append((task.sequence.decode_worker, Withdrawn(task.sequence.id)))
        core.cache.release(task.pages)
        core.queue.add(PrefillTask(task.sequence))
        return True

    def _run_gives_way(self, run: HasSequence) -> bool:
        """Ends a run of pages that is fetched; the prompt that it is for starts anew."""
        core, store = self._prefill, self._prefill.store
        if store is None or not store.give_way(run):
            return False
        waiting = store.abort(run.sequence.id)
        if waiting is not None:
            core.cache.release(waiting.pages)
            core.queue.add(PrefillTask(waiting.sequence))
        return True

    def hold_moved(self, sequence: Sequence, moved: Moved, pages: list[int]) -> None:
        """Holds the KV of a row that leaves the mesh until it has been fetched.

        Args:
            sequence: of the row.
            moved: what it takes along.
            pages: of that, each with a reference.
        """
        sequence = msgspec.structs.replace(
            sequence, covered=moved.num_kv, keys=moved.keys[:-1], last_key=moved.keys[-1]
        )
        task = PrefillTask(sequence, pages, filled=moved.num_kv, moved=True)
        self._prefill.held.add(moved.id, task)
