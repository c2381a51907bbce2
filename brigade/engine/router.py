"""Which rank gets which request: keeps what is in flight on each rank and asks core/routing.py. Sends nothing."""

from collections.abc import Collection
from dataclasses import dataclass

from brigade.core.prefixes import SentPrefixes
from brigade.core.routing import NewRequest, RankLoad, Role, Weights, choose, pairs
from brigade.spec.model import Mla, ModelSpec
from brigade.spec.params import active

NO_LIMIT = 1 << 60


def weights_of(spec: ModelSpec) -> Weights:
    """What attention costs beside the rest of the model: multiplications of a query-key pair over those of a token, and
    numbers of a cached token over those of the weights that a token uses."""
    a = spec.attention
    per_pair = a.n_heads * (a.qk + a.v if isinstance(a, Mla) else 2 * a.head_dim)
    token = active(spec)
    return Weights(pair=spec.n_layers * per_pair / token, kv=spec.n_layers * spec.kv_width / token)


@dataclass(slots=True)
class InFlight:
    """One request and the rank it was given to."""

    rank: int
    n_prompt: int
    n_new: int = 0
    """Tokens it has got."""


class Router:
    """Gives each request a rank. One unit of `n_ranks`, each with `pages` pages of `page` tokens."""

    def __init__(
        self, spec: ModelSpec, n_ranks: int, max_running: int, page: int, pages: int, role: Role = "both"
    ) -> None:
        self._weights, self._role = weights_of(spec), role
        self._n_ranks, self._max_running, self._max_tokens = n_ranks, max_running, page * pages
        self._page, self._pages = page, pages
        self._sent = [SentPrefixes(page, pages) for _ in range(n_ranks)]
        self._in_flight: dict[int, InFlight] = {}
        self._last = -1

    def place(self, rid: int, prompt: list[int], max_new: int, salt: str, among: Collection[int] | None = None) -> int:
        """The rank of a new request, which is in flight from now on. Where every rank is full it waits on the one that
        has the least to do.

        `among`: ranks that can be had now, at least one; None: all.
        """
        if self._n_ranks == 1:
            rank = 0
        else:
            cached = {rank: sent.known(prompt, salt) for rank, sent in enumerate(self._sent)}
            ranks = range(self._n_ranks) if among is None else among
            rank = self._choose(NewRequest(len(prompt), max_new), cached, ranks)
            self._sent[rank].add(prompt, salt)
        self._in_flight[rid] = InFlight(rank, len(prompt))
        self._last = rank
        return rank

    def put(self, rid: int, rank: int, n_prompt: int) -> None:
        """A request that somebody else has placed is in flight on this rank from now on."""
        self._in_flight[rid] = InFlight(rank, n_prompt)

    def _choose(self, request: NewRequest, cached: dict[int, int], ranks: Collection[int]) -> int:
        for max_requests, max_tokens in (self._max_running, self._max_tokens), (NO_LIMIT, NO_LIMIT):
            loads = [self._load(rank, max_requests, max_tokens) for rank in ranks]
            rank = choose(request, loads, weights=self._weights, role=self._role, cached=cached, last=self._last)
            if rank is not None:
                return rank
        raise AssertionError("a rank without limits has room")

    def rank_of(self, rid: int) -> int | None:
        """None for a request that has ended."""
        found = self._in_flight.get(rid)
        return None if found is None else found.rank

    def got_token(self, rid: int) -> None:
        if found := self._in_flight.get(rid):
            found.n_new += 1

    def ended(self, rid: int) -> None:
        self._in_flight.pop(rid, None)

    def lost(self, rank: int) -> list[int]:
        """A rank has lost its cache: forget what it had of prompts. Returns the requests that were in flight there."""
        self._sent[rank] = SentPrefixes(self._page, self._pages)
        return [rid for rid, request in self._in_flight.items() if request.rank == rank]

    def _load(self, rank: int, max_requests: int, max_tokens: int) -> RankLoad:
        mine = [r for r in self._in_flight.values() if r.rank == rank]
        queued = [r.n_prompt for r in mine if not r.n_new]
        return RankLoad(
            rank=rank,
            queued_tokens=sum(queued),
            queued_pairs=sum(pairs(n, 0) for n in queued),
            n_requests=len(mine),
            max_requests=max_requests,
            kv_tokens=sum(r.n_prompt + r.n_new for r in mine),
            max_kv_tokens=max_tokens,
        )
