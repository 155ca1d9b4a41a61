"""What a prefill core waits for from the KV store: answers, and runs of pages in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.pages.prefix_index import Node, PageState
from pshare_jax.core.plans import Load
from pshare_jax.core.prefill_task import PrefillTask
from pshare_jax.core.sequences import Sequence
from pshare_jax.core.write_behind import page_keys

PIECE_PAGES = 16
"""Pages of a piece of a run, and of one call that copies pages for being written."""


@dataclass(eq=False)
class Looking:
    """A prompt that is looked for, from page number `first` on.

    `seconds` is how long its answer is worth waiting for.
    """

    task: PrefillTask
    first: int
    seconds: float
    since: float | None = None


@dataclass(eq=False)
class Piece:
    """Pages that are fetched together: nodes by page number within the sequence."""

    transfer: int
    nodes: list[Node]
    load: Load
    loaded: bool = False


@dataclass(eq=False)
class Run:
    """Pages that are fetched for one prompt; all of them, and those before them, are referenced.

    Nobody has asked for those of one that is `early`."""

    sequence: Sequence
    pages: list[int]
    seconds: float
    early: bool = False
    pieces: dict[int, Piece] = field(default_factory=dict[int, Piece])
    since: float | None = None


def begin_run(
    cache: PageCache,
    sequence: Sequence,
    matched: list[Node],
    fresh: list[int],
    places: list[int],
    ids: Iterator[int],
    seconds: float,
    early: bool,
) -> Run:
    """Enters pages that will be fetched into the index.

    Args:
        cache: the pages.
        sequence: the prompt that they are part of.
        matched: the indexed pages before them, referenced.
        fresh: allocated pages for them.
        places: where each of them is in the store.
        ids: of transfers.
        seconds: how long they are worth waiting for.
        early: whether nobody has asked for them.
    """
    page_size, number = cache.page_size, len(matched)
    parent = matched[-1] if matched else None
    pages = [*(node.page for node in matched), *fresh]
    end = min(len(pages) * page_size, sequence.covered)
    run = Run(sequence, pages, seconds, early)
    chain = page_keys(sequence, page_size)
    for first in range(number, len(pages), PIECE_PAGES):
        nodes: list[Node] = []
        for at in range(first, min(first + PIECE_PAGES, len(pages))):
            tokens = sequence.prompt[at * page_size : min((at + 1) * page_size, end)]
            parent = Node(
                parent=parent,
                parent_key=sequence.parent_key(at),
                page=pages[at],
                tokens=tokens,
                # Who had it computed is not known; it is not counted as another's.
                origins=[sequence.model] * len(tokens),
                key=sequence.keys[at] if at < len(sequence.keys) else None,
                state=PageState.ARRIVING,
                filler=sequence.id,
                early=early,
            )
            cache.insert(parent)
            nodes.append(parent)
        load = Load(
            next(ids),
            chain[first : first + len(nodes)],
            [node.tokens for node in nodes],
            places[first - number : first - number + len(nodes)],
            early,
        )
        run.pieces[load.transfer] = Piece(load.transfer, nodes, load)
    return run
