"""A prompt that is being covered, and how its pages are found, extended, copied and indexed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.pages.prefix_index import Node, PageState
from pshare_jax.core.requests import PromptUsage
from pshare_jax.core.sequences import Sequence


@dataclass(eq=False)
class PrefillTask:
    """A sequence here: its pages in order of position, and how far they are filled.

    `reused` counts the prompt tokens found in the index by the model that had them computed. `node`
    is the page that the planned chunk extends, `copied_origins` belong to the tokens of a copied
    page. `planned` is where the chunk ends that is being computed. While it waited, smaller ones
    that went past it took `passed` pages. For one that is `favoured` others were made to give way.
    A task that runs `ahead` covers a reply that nobody asks for yet; `foreseen` are the found
    tokens that such a task had computed. One that was `moved` is a decode module's row that leaves
    the mesh: nobody else may use its KV.
    """

    sequence: Sequence
    pages: list[int] = field(default_factory=list[int])
    node: Node | None = None
    copied_origins: list[str] = field(default_factory=list[str])
    filled: int = 0
    computed: int = 0
    planned: int | None = None
    tries: int = 0
    passed: int = 0
    favoured: bool = False
    reused: Counter[str] = field(default_factory=Counter[str])
    ahead: bool = False
    foreseen: int = 0
    moved: bool = False

    @property
    def order(self) -> int:
        """Arrival order."""
        return self.sequence.order

    @property
    def remaining(self) -> int:
        """Prompt tokens still to be covered."""
        return self.sequence.covered - self.filled

    def account(self, node: Node, length: int) -> None:
        """Counts the first tokens of an indexed page as found."""
        self.reused.update(node.origins[:length])
        self.filled += length
        node.early = False
        if node.ahead and not self.ahead:
            self.foreseen += node.use(length)

    def take_landed(self, cache: PageCache) -> None:
        """Counts pages that were fetched into its own ones as found, as far as all have come."""
        while self.remaining:
            node = cache.node_of(self.pages[self.filled // cache.page_size])
            if node is None or node.state is not PageState.READY:
                return
            self.account(node, min(len(node.tokens), self.remaining))

    def usage(self) -> PromptUsage:
        """Where this prompt's KV came from."""
        own = self.reused[self.sequence.model]
        cached = self.reused.total()
        return PromptUsage(
            prompt_tokens=len(self.sequence.prompt),
            computed_tokens=self.computed,
            cached_tokens=cached,
            shared_tokens=cached - own,
        )


class PromptPages:
    """What the prefix index gives to prompts, and what it gets from them.

    Args:
        cache: the pages.
    """

    def __init__(self, cache: PageCache):
        self._cache = cache

    def reuse(self, task: PrefillTask, copies: list[tuple[int, int]]) -> None:
        """Moves `task.filled` on over everything the index holds, up to what is on its way."""
        sequence, page_size = task.sequence, self._cache.page_size
        task.node, task.copied_origins = None, []
        while task.remaining:
            number = task.filled // page_size
            start = number * page_size
            block = sequence.prompt[start : min(start + page_size, sequence.covered)]
            if number < len(sequence.keys):
                key = sequence.keys[number : number + 1]
                if self._cache.is_arriving(key[0]):
                    return
                if found := self._cache.match(key, block):
                    self._replace_page(task, number, found[0].page)
                    task.account(found[0], page_size)
                    continue
            self._reuse_part(task, number, block, copies)
            return

    def reach(self, task: PrefillTask, end: int) -> int:
        """How far a chunk that is to end at `end` may go: up to a page that is on its way.

        Somebody else brings that one, in a pool where rows fetch pages, too.
        """
        page_size = self._cache.page_size
        for number in range(task.filled // page_size, -(-end // page_size)):
            keys = task.sequence.keys[number : number + 1]
            if keys and self._cache.is_arriving(keys[0]):
                return number * page_size
        return end

    def _reuse_part(
        self,
        task: PrefillTask,
        number: int,
        block: tuple[int, ...],
        copies: list[tuple[int, int]],
    ) -> None:
        """Uses the page that starts with most of `block`: as it is, extended, or copied."""
        child = self._cache.best_child(task.sequence.parent_key(number), block)
        if child is None or child[1] == 0:
            return
        node, length = child
        whole = length == len(block)
        extend = node.key is None and length == len(node.tokens) and not node.extending
        if whole or extend:
            self._cache.retain(node)
            self._replace_page(task, number, node.page)
            if not whole:
                task.node, node.extending = node, True
        else:
            copies.append((node.page, task.pages[number]))
            task.copied_origins = node.origins[:length]
        task.account(node, length)

    def _replace_page(self, task: PrefillTask, number: int, page: int) -> None:
        self._cache.release([task.pages[number]])
        task.pages = [*task.pages[:number], page, *task.pages[number + 1 :]]

    def index(self, task: PrefillTask, end: int) -> None:
        """Enters the pages that hold positions task.filled .. end-1 into the index.

        Not those of which others are on their way there: since the chunk was planned a row of the
        same pool may have begun to fetch them. Nor what follows such pages.
        """
        sequence, page_size = task.sequence, self._cache.page_size
        first = task.filled // page_size
        parent = self._full_page(task, first - 1) if first else None
        if first and (parent is None or parent.state is not PageState.READY):
            return
        for number in range(first, -(-end // page_size)):
            tokens = sequence.prompt[number * page_size : min((number + 1) * page_size, end)]
            key = sequence.keys[number] if len(tokens) == page_size else None
            node = task.node if number == first else None
            other = self._full_page(task, number) if key is not None else None
            if other is not None:
                if node is not None:
                    # Full and without a key: nobody may extend it any more.
                    self._extend(task, node, tokens, None)
                return
            if node is None:
                copied = task.copied_origins if number == first else []
                node = Node(
                    parent=parent,
                    parent_key=sequence.parent_key(number),
                    page=task.pages[number],
                    tokens=tokens,
                    origins=[*copied, *[sequence.model] * (len(tokens) - len(copied))],
                    key=key,
                )
                self._cache.insert(node)
            else:
                self._extend(task, node, tokens, key)
            if task.ahead:
                start = max(task.filled - number * page_size, 0)
                node.ahead.update(range(start, len(tokens)))
            parent = node

    def _full_page(self, task: PrefillTask, number: int) -> Node | None:
        """The indexed page `number` of a task's prompt, which must be a full one."""
        start = number * self._cache.page_size
        tokens = task.sequence.prompt[start : start + self._cache.page_size]
        return self._cache.find(task.sequence.keys[number], tokens)

    def _extend(
        self, task: PrefillTask, node: Node, tokens: tuple[int, ...], key: bytes | None
    ) -> None:
        origins = [task.sequence.model] * (len(tokens) - len(node.tokens))
        self._cache.extend(node, tokens, origins, key)
