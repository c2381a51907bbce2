"""Which rank gets which request: keeps what is in flight on each rank and asks core/routing.py. Sends nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from brigade.core.prefixes import SentPrefixes
from brigade.core.routing import NewRequest, RankLoad, Weights, choose, pairs
from brigade.spec.layout import Role
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


@dataclass(frozen=True, slots=True)
class Room:
    """What one rank takes on."""

    max_running: int
    pages: int


@dataclass(slots=True)
class InFlight:
    """One request, or a part of one, and the rank it was given to."""

    rank: int
    n_prompt: int
    computes: bool = True
    """The prompt is computed there."""
    n_new: int = 0
    """Tokens it has got."""


@dataclass(slots=True)
class Has:
    """What is in flight on one rank, counted as it comes and goes: adding up thousands of requests for each new one
    would take the gateway milliseconds."""

    rids: dict[int, None] = field(default_factory=dict)
    """In the order in which they came."""
    kv_tokens: int = 0
    queued_tokens: int = 0
    queued_pairs: float = 0.0

    def queue(self, n_prompt: int, sign: int) -> None:
        """A prompt is to be computed (1), or need not be any more (-1). Pairs are halves of whole numbers, so their sum
        comes back to nothing."""
        self.queued_tokens += sign * n_prompt
        self.queued_pairs += sign * pairs(n_prompt, 0)


class Router:
    """Gives each request a rank, of one unit or of several, whose pages have `page` tokens."""

    def __init__(self, spec: ModelSpec, page: int, rooms: Sequence[Room]) -> None:
        self._weights, self._page, self._rooms = weights_of(spec), page, list(rooms)
        self._roles: Mapping[int, Role] = dict.fromkeys(range(len(rooms)), "mixed")
        self._sent = [SentPrefixes(page, room.pages) for room in rooms]
        self._in_flight: dict[int, InFlight] = {}
        self._has = [Has() for _ in rooms]
        self._last = -1

    def place(
        self, rid: int, prompt: list[int], max_new: int, salt: str, among: Mapping[int, Role] | None = None
    ) -> int:
        """The rank of a new request, which is in flight from now on. Where every rank is full it waits on the one that
        has the least to do.

        `among`: ranks that can be had now, at least one, and what they do; None: all of them, and all of it.
        """
        roles = self._roles if among is None else among
        if len(self._rooms) == 1:
            rank = 0
        else:
            cached = {rank: self._sent[rank].known(prompt, salt) for rank in roles}
            rank = self._choose(NewRequest(len(prompt), max_new), cached, roles)
            self._sent[rank].add(prompt, salt)
        self._begin(rid, InFlight(rank, len(prompt), roles[rank] != "decode"))
        self._last = rank
        return rank

    def put(self, rid: int, rank: int, n_prompt: int) -> None:
        """A request that somebody else has placed is in flight on this rank from now on."""
        self._begin(rid, InFlight(rank, n_prompt))

    def _choose(self, request: NewRequest, cached: dict[int, int], roles: Mapping[int, Role]) -> int:
        for limited in (True, False):
            loads = self._loads(roles, limited)
            rank = choose(request, loads, weights=self._weights, cached=cached, last=self._last)
            if rank is not None:
                return rank
        raise AssertionError("a rank without limits has room")

    def rank_of(self, rid: int) -> int | None:
        """None for a request that has ended."""
        found = self._in_flight.get(rid)
        return None if found is None else found.rank

    def got_token(self, rid: int) -> None:
        if found := self._in_flight.get(rid):
            has = self._has[found.rank]
            if found.computes and not found.n_new:
                has.queue(found.n_prompt, -1)
            found.n_new += 1
            has.kv_tokens += 1

    def ended(self, rid: int) -> None:
        if found := self._in_flight.pop(rid, None):
            has = self._has[found.rank]
            if found.computes and not found.n_new:
                has.queue(found.n_prompt, -1)
            del has.rids[rid]
            has.kv_tokens -= found.n_prompt + found.n_new

    def lost(self, rank: int) -> list[int]:
        """A rank has lost its cache: forget what it had of prompts. Returns the requests that were in flight there."""
        self._sent[rank] = SentPrefixes(self._page, self._rooms[rank].pages)
        return list(self._has[rank].rids)

    def _loads(self, roles: Mapping[int, Role], limited: bool) -> list[RankLoad]:
        """`limited`: by the room of each rank."""
        return [self._load(rank, role, limited) for rank, role in roles.items()]

    def _load(self, rank: int, role: Role, limited: bool) -> RankLoad:
        has, room = self._has[rank], self._rooms[rank]
        return RankLoad(
            rank=rank,
            queued_tokens=has.queued_tokens,
            queued_pairs=has.queued_pairs,
            n_requests=len(has.rids),
            max_requests=room.max_running if limited else NO_LIMIT,
            kv_tokens=has.kv_tokens,
            max_kv_tokens=room.pages * self._page if limited else NO_LIMIT,
            role=role,
        )

    def _begin(self, rid: int, request: InFlight) -> None:
        self._in_flight[rid] = request
        has = self._has[request.rank]
        has.rids[rid] = None
        has.kv_tokens += request.n_prompt
        if request.computes:
            has.queue(request.n_prompt, 1)
