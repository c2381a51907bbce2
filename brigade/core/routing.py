"""Which rank gets a new request. Pure: counts in, a rank out; it keeps nothing between two calls.

Ranks run in step, so the busiest one sets the pace of all. Everything is counted in one unit, the work of one token
without its attention, so that prefill, decode and cached tokens can be weighed against each other:

    prefill work   tokens to compute, plus `pair` for each query-key pair of their attention
    decode work    requests that decode, plus `kv` for each token of KV cache that they read in every step
    cost           prefill work + the steps that the request will decode for * decode work
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from brigade.spec.layout import Role


@dataclass(frozen=True, slots=True)
class Weights:
    """What attention costs, in tokens: from the model's FLOPs in prefill, and from its bytes in decode."""

    pair: float
    """One query-key pair in prefill, over one token through everything else."""
    kv: float
    """Reading the KV cache of one token in a decode step, over one more request in the batch."""

    def __post_init__(self) -> None:
        if not (0 <= self.pair < float("inf") and 0 <= self.kv < float("inf")):
            raise ValueError("weights pair and kv must be finite and not negative")


@dataclass(frozen=True, slots=True)
class RankLoad:
    """What one rank has to do, and how much room it has."""

    rank: int
    queued_tokens: int
    """Prompt tokens that are not computed yet, of waiting and running requests."""
    queued_pairs: float
    """The query-key pairs of their attention: the sum of `pairs` over those requests."""
    n_requests: int
    """Waiting and running."""
    max_requests: int
    kv_tokens: int
    """Positions of KV cache that are held or promised: the whole prompts of waiting requests count."""
    max_kv_tokens: int
    role: Role = "mixed"
    """What it does. The half that it does not do costs nothing."""


@dataclass(frozen=True, slots=True)
class NewRequest:
    """What is known of a request before it runs."""

    n_prompt: int
    n_new: int
    """The steps that it is expected to decode for; its limit where nothing better is known."""

    def __post_init__(self) -> None:
        if self.n_prompt < 1 or self.n_new < 1:
            raise ValueError("a request needs n_prompt and n_new of at least 1")


def pairs(n: int, cached: int) -> float:
    """Query-key pairs of computing n tokens behind `cached` known ones."""
    return n * (cached + n / 2)


def prefill_work(tokens: int, n_pairs: float, weights: Weights) -> float:
    return tokens + weights.pair * n_pairs


def decode_work(n_requests: int, kv_tokens: int, weights: Weights) -> float:
    """Of one step."""
    return n_requests + weights.kv * kv_tokens


def has_room(load: RankLoad, request: NewRequest) -> bool:
    """Whether the rank may take the request: a free place, and room for its prompt and first token.

    Cached tokens do not count as room: they may be on pages that are free, which taking them uses up.
    """
    fits = load.kv_tokens + request.n_prompt + 1 <= load.max_kv_tokens
    return fits and load.n_requests < load.max_requests


def standing_cost(load: RankLoad, request: NewRequest, weights: Weights) -> float:
    """What the rank has to do anyway while the request is there."""
    prefill = prefill_work(load.queued_tokens, load.queued_pairs, weights)
    decode = request.n_new * decode_work(load.n_requests, load.kv_tokens, weights)
    return _of_role(load.role, prefill, decode)


def added_cost(request: NewRequest, cached: int, role: Role, weights: Weights) -> float:
    """What the request itself costs on a rank that has `cached` of its prompt's tokens.

    At least one token is left to compute, as in the page pool. Shared KV is still read once for each request, so
    cached tokens lighten prefill only; a rank that only decodes saves their transfer, which counts like computing
    a token.
    """
    cached = min(cached, request.n_prompt - 1)
    n = request.n_prompt - cached
    prefill = prefill_work(n, pairs(n, cached), weights)
    decode = request.n_new * decode_work(1, request.n_prompt, weights)
    return decode + n if role == "decode" else _of_role(role, prefill, decode)


def choose(
    request: NewRequest,
    loads: Sequence[RankLoad],
    *,
    weights: Weights,
    cached: Mapping[int, int] | None = None,
    last: int = -1,
    bound: float = 0.5,
) -> int | None:
    """The rank with room on which the request makes for the least cost; None if no rank has room.

    cached: rank -> tokens of the prompt that it is known to have; absent is 0.
    last: the rank that was chosen last; equal ranks are taken in turn from the next one on.
    bound: cached tokens count only on ranks that have at most this much more to do than the least busy one with
        room, as a share of what the request costs uncached. 0: a shared prefix never leads to a busier rank; 1 is as
        far as saved work can ever pay.
    """
    if not 0 <= bound <= 1:
        raise ValueError("bound must be from 0 to 1")
    free = [x for x in loads if has_room(x, request)]
    if not free:
        return None
    standing = {x.rank: standing_cost(x, request, weights) for x in free}
    whole = {role: added_cost(request, 0, role, weights) for role in {x.role for x in free}}
    least, known = min(standing.values()), cached or {}
    cost = {}
    for x in free:
        busy, alone = standing[x.rank], whole[x.role]
        has = known.get(x.rank, 0) if busy <= least + bound * alone else 0
        cost[x.rank] = busy + (added_cost(request, has, x.role, weights) if has else alone)
    return _next_of(cost, last)


def _next_of(cost: Mapping[int, float], last: int) -> int:
    """The cheapest rank; of equal ones the first behind `last`, beginning again at the lowest."""
    least = min(cost.values())
    return _in_turn((rank for rank, x in cost.items() if x == least), last)


def _in_turn(ranks: Iterable[int], last: int) -> int:
    return min(ranks, key=lambda rank: (rank <= last, rank))


def _of_role(role: Role, prefill: float, decode: float) -> float:
    return {"prefill": prefill, "decode": decode, "mixed": prefill + decode}[role]
