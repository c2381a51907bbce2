"""Pages of the KV cache: who holds them and which hold a known prefix. Page numbers only; never sees memory.

Life of a page: free -> taken (refs 1) -> published (its tokens are known) -> shared (refs 2..) -> released (refs 0, on
the free list but still findable) -> found again (refs 1) or overwritten (forgotten).
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

Prefix = tuple[int | str, tuple[int, ...]]
"""What a full page holds: its parent (the node before it, or the tenant's salt at the root) and its own tokens."""


class Known(NamedTuple):
    """How far a request's pages are published: how many of them, and the node that the last one stands for."""

    n_pages: int
    node: int | str


NOTHING_KNOWN = Known(0, "")


class PagePool:
    """Reference-counted pages with a prefix cache.

    A published page is a node in a tree of prefixes, found by its parent node and its own tokens. The dictionary
    compares tokens, so equal hashes cannot mix prefixes up, and node numbers are never used twice, so a page that was
    overwritten takes its descendants out of reach. Free pages are reused oldest first, those without a known prefix
    before all others; a request gives its pages back last page first, so leaves go before what they stand on.
    """

    def __init__(self, n_pages: int, page: int) -> None:
        if n_pages < 1 or page < 1:
            raise ValueError("a pool needs at least one page of at least one token")
        self.n_pages, self.page = n_pages, page
        self.refs = [0] * n_pages
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(n_pages))
        self._found: dict[Prefix, tuple[int, int]] = {}
        """Prefix -> (page, node)."""
        self._prefix_of: dict[int, Prefix] = {}
        self._nodes = count()

    @property
    def n_free(self) -> int:
        return len(self._free)

    def match(self, tokens: Sequence[int], salt: str = "") -> tuple[list[int], Known]:
        """Pages that hold the longest known prefix of `tokens`, and how far they reach. Takes nothing.

        At least one token is left over to compute, since only a computed token yields a next one.
        """
        pages: list[int] = []
        node: int | str = salt
        for end in range(self.page, len(tokens), self.page):
            hit = self._found.get((node, tuple(tokens[end - self.page : end])))
            if hit is None:
                break
            page, node = hit
            pages.append(page)
        return pages, Known(len(pages), node)

    def take(self, n_new: int, found: Sequence[int] = (), spare: int = 0) -> list[int] | None:
        """Hold the pages `found` by match() and `n_new` fresh ones.

        None, holding nothing, if fewer than `spare` pages would be left free.
        """
        idle = sum(self.refs[p] == 0 for p in found)
        if len(self._free) - idle - n_new < spare:
            return None
        for p in found:
            self._free.pop(p, None)
            self.refs[p] += 1
        return [*found, *(self._fresh() for _ in range(n_new))]

    def publish(self, tokens: Sequence[int], pages: Sequence[int], known: Known) -> Known:
        """Make the full pages of `tokens` after the `known` ones findable; returns how far they now reach.

        The first page published for a prefix stays its page; a second one with the same tokens stays private.
        """
        node = known.node
        n_full = len(tokens) // self.page
        for i in range(known.n_pages, n_full):
            prefix = (node, tuple(tokens[i * self.page : (i + 1) * self.page]))
            hit = self._found.get(prefix)
            if hit is None:
                hit = self._found[prefix] = (pages[i], next(self._nodes))
                self._prefix_of[pages[i]] = prefix
            node = hit[1]
        return Known(max(n_full, known.n_pages), node)

    def node(self, page: int) -> int | None:
        """What a page is found as; None if it is not. Numbers are never used twice: while this one stays, so does what
        the page holds. Other threads may ask, too."""
        prefix = self._prefix_of.get(page)
        hit = None if prefix is None else self._found.get(prefix)
        return None if hit is None else hit[1]

    def unpublish(self, pages: Sequence[int]) -> None:
        """Make pages unfindable: what was to be written into them never came. Who holds them goes on holding them."""
        for p in pages:
            prefix = self._prefix_of.pop(p, None)
            if prefix is None:
                continue
            del self._found[prefix]
            if self.refs[p] == 0:
                self._free.move_to_end(p, last=False)

    def release(self, pages: Sequence[int]) -> None:
        """Let go of pages. Their content stays findable until they are needed for something else."""
        for p in reversed(pages):
            if self.refs[p] < 1:
                raise ValueError(f"page {p} is released more often than it was taken")
            self.refs[p] -= 1
            if self.refs[p] == 0:
                self._free[p] = None
                if p not in self._prefix_of:  # nobody can find what it holds: reuse it before anything that is found
                    self._free.move_to_end(p, last=False)

    def _fresh(self) -> int:
        page, _ = self._free.popitem(last=False)
        prefix = self._prefix_of.pop(page, None)
        if prefix is not None:
            del self._found[prefix]
        self.refs[page] = 1
        return page
