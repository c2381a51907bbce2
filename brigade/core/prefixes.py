"""Which rank has probably cached a prompt's beginning: what was sent where, remembered in pages. Decides nothing.

A guess, not a promise: the rank may have overwritten its pages meanwhile, and then it computes them again.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence


class SentPrefixes:
    """The prompts that one rank was given lately, as a bounded set of prefixes of whole pages.

    A prefix is a hash of all its tokens and of the tenant's salt. Unequal prefixes with one hash would send a request
    to a rank that has less of it than thought; they cannot mix texts up, since the rank's own pool compares tokens.
    """

    def __init__(self, page: int, most: int) -> None:
        """`most` pages are remembered: as many as the rank has."""
        self.page, self.most = page, most
        self._seen: OrderedDict[int, None] = OrderedDict()

    def add(self, tokens: Sequence[int], salt: str = "") -> None:
        for prefix in self._prefixes(tokens, salt):
            self._seen[prefix] = None
            self._seen.move_to_end(prefix)
        while len(self._seen) > self.most:
            self._seen.popitem(last=False)

    def known(self, tokens: Sequence[int], salt: str = "") -> int:
        """Tokens at the beginning of `tokens` that the rank was given before."""
        n = 0
        for prefix in self._prefixes(tokens, salt):
            if prefix not in self._seen:
                break
            n += self.page
        return n

    def _prefixes(self, tokens: Sequence[int], salt: str) -> Iterator[int]:
        node = hash(salt)
        for end in range(self.page, len(tokens) + 1, self.page):
            node = hash((node, tuple(tokens[end - self.page : end])))
            yield node
