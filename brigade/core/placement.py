"""Which physical slot holds which logical expert. Pure: loads in, slot numbers out; never sees a weight.

A logical expert is one of the model's. A physical slot is room for one expert's weights on one rank. With more slots
than experts, busy experts have replicas, and the tokens of an expert are spread evenly over its replicas.

Life of a placement:
1. initial: no loads are known; ranks are even if all experts are.
2. place: loads were counted; a better one is computed.
3. replicas_for: each rank makes the table by which its tokens choose among an expert's replicas.
(moves.py says how one placement becomes another.)
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import heapify, heappop, heapreplace

Loads = Sequence[Sequence[float]]
"""Tokens that went to each logical expert, by layer: [L][E]. Only their proportions matter."""


def cut(total: int, parts: int) -> tuple[range, ...]:
    """0..total in contiguous ranges whose lengths differ by one at most."""
    return tuple(range(i * total // parts, (i + 1) * total // parts) for i in range(parts))


@dataclass(frozen=True)
class Placement:
    """Experts in slots for every layer; each rank has a contiguous range of slots, each node of ranks.

    Raises ValueError where an expert has no slot, an expert is not known, or layers differ in their slots.
    """

    n_experts: int
    n_ranks: int
    n_nodes: int
    phy2log: tuple[tuple[int, ...], ...]
    """[layer][slot] -> logical expert."""
    by_node: bool = False
    """Experts were packed to nodes by their groups, so they may not change nodes one by one."""

    def __post_init__(self) -> None:
        if self.n_ranks < 1 or not 1 <= self.n_nodes <= self.n_ranks:
            raise ValueError(f"n_ranks {self.n_ranks} and n_nodes {self.n_nodes}: at least one rank on each node")
        every = set(range(self.n_experts))
        for layer, slots in enumerate(self.phy2log):
            if len(slots) != self.n_slots:
                raise ValueError(f"layer {layer} has {len(slots)} slots, layer 0 has {self.n_slots}")
            if set(slots) != every:
                wrong = sorted(every ^ set(slots))[:8]
                raise ValueError(f"layer {layer}: experts {wrong} have no slot or are not among {self.n_experts}")

    @property
    def n_layers(self) -> int:
        return len(self.phy2log)

    @property
    def n_slots(self) -> int:
        return len(self.phy2log[0]) if self.phy2log else 0

    @cached_property
    def slots_of_rank(self) -> tuple[range, ...]:
        return cut(self.n_slots, self.n_ranks)

    @cached_property
    def ranks_of_node(self) -> tuple[range, ...]:
        return cut(self.n_ranks, self.n_nodes)

    @cached_property
    def rank_of_slot(self) -> tuple[int, ...]:
        return tuple(rank for rank, slots in enumerate(self.slots_of_rank) for _ in slots)

    @cached_property
    def node_of_rank(self) -> tuple[int, ...]:
        return tuple(node for node, ranks in enumerate(self.ranks_of_node) for _ in ranks)

    @cached_property
    def log2phy(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """[layer][logical expert] -> its slots, ascending."""
        return tuple(_slots_by_expert(slots, self.n_experts) for slots in self.phy2log)


def initial(
    n_layers: int, n_experts: int, *, n_slots: int, n_ranks: int, n_nodes: int = 1, n_groups: int = 1
) -> Placement:
    """The placement before any load is known, even if all experts are equally busy; the same in every layer.

    Without spare slots, experts stand in their order. Raises ValueError for sizes that cannot be.
    """
    even = place([[1.0] * n_experts], n_slots=n_slots, n_groups=n_groups, n_nodes=n_nodes, n_ranks=n_ranks)
    one = tuple(range(n_experts))
    if n_slots > n_experts:
        one = tuple(e for mine in even.slots_of_rank for e in sorted(even.phy2log[0][mine.start : mine.stop]))
    return replace(even, phy2log=(one,) * n_layers)


def place(load_LE: Loads, *, n_slots: int, n_groups: int, n_nodes: int, n_ranks: int) -> Placement:
    """A placement that evens out the ranks' loads, by the idea DeepSeek published as EPLB.

    Where groups divide evenly over nodes: whole groups are packed to nodes (a token of group-limited routing then
    reaches few nodes), the heaviest experts get replicas within their node, and replicas are packed to its ranks.
    Otherwise the same over all ranks at once, without regard to groups and nodes. No layer is ever worse than with
    one slot for each expert. A layer without any load counts as evenly loaded.

    Raises ValueError for loads that are ragged, negative or not finite, or sizes that cannot be.
    """
    n_experts = _check(load_LE, n_slots, n_groups, n_nodes, n_ranks)
    by_node = n_nodes > 1 and n_groups % n_nodes == 0 and n_ranks % n_nodes == 0
    sizes = [len(slots) for slots in cut(n_slots, n_ranks)]
    size_of_group = n_experts // n_groups
    layers = []
    for load in load_LE:
        weights = [float(x) for x in load] if any(load) else [1.0] * n_experts
        if not by_node:
            layers.append(_spread(range(n_experts), weights, sizes))
            continue
        of_group = [sum(weights[g * size_of_group : (g + 1) * size_of_group]) for g in range(n_groups)]
        slots: list[int] = []
        for groups, ranks in zip(
            _pack(range(n_groups), of_group, [n_groups // n_nodes] * n_nodes), cut(n_ranks, n_nodes), strict=True
        ):
            experts = [e for g in sorted(groups) for e in range(g * size_of_group, (g + 1) * size_of_group)]
            slots += _spread(experts, weights, sizes[ranks.start : ranks.stop])
        layers.append(tuple(slots))
    return Placement(n_experts, n_ranks, n_nodes, tuple(layers), by_node)


def rank_loads(load_LE: Loads, placement: Placement) -> tuple[tuple[float, ...], ...]:
    """[layer][rank] -> load, when each expert's tokens are spread evenly over its replicas."""
    if len(load_LE) != placement.n_layers or any(len(load) != placement.n_experts for load in load_LE):
        raise ValueError(f"loads must be {placement.n_layers} layers of {placement.n_experts} experts")
    result = []
    for load, slots in zip(load_LE, placement.phy2log, strict=True):
        copies = Counter(slots)
        share = [load[e] / copies[e] for e in range(placement.n_experts)]
        result.append(tuple(sum(share[slots[s]] for s in mine) for mine in placement.slots_of_rank))
    return tuple(result)


def busiest_over_mean(load_LE: Loads, placement: Placement) -> tuple[float, ...]:
    """[layer] -> load of the busiest rank over that of the mean rank: 1.0 is a perfect split. 1.0 without any load."""
    return tuple(max(x) * len(x) / total if (total := sum(x)) else 1.0 for x in rank_loads(load_LE, placement))


def replicas_for(placement: Placement, layer: int, rank: int, *, width: int = 8) -> tuple[tuple[int, ...], ...]:
    """[logical expert][width] -> the slots that this source rank uses in turn, by token number modulo width.

    A rank uses a replica of its own first, then one of its node, then any, but only as far as all replicas of an
    expert get the same share of what all ranks send together (ranks that send equally much are assumed). Each rank
    computes the same split and reads its own row, so nothing has to be agreed.
    """
    if width < 1:
        raise ValueError("width must be at least 1")
    rows = []
    for replicas in placement.log2phy[layer]:
        if len(replicas) == 1:
            rows.append(replicas * width)
        else:
            rows.append(_in_turn(_shares(placement, replicas, width)[rank]))
    return tuple(rows)


def _check(load_LE: Loads, n_slots: int, n_groups: int, n_nodes: int, n_ranks: int) -> int:
    """The number of experts. Raises ValueError for sizes and loads that cannot be."""
    if not load_LE or not load_LE[0]:
        raise ValueError("loads need at least one layer and one expert")
    n_experts = len(load_LE[0])
    for layer, load in enumerate(load_LE):
        if len(load) != n_experts:
            raise ValueError(f"loads of layer {layer} are of {len(load)} experts, those of layer 0 of {n_experts}")
        if not all(0 <= x < float("inf") for x in load):
            raise ValueError(f"loads of layer {layer} must be finite and not negative")
    if n_slots < n_experts:
        raise ValueError(f"n_slots {n_slots} cannot hold {n_experts} experts")
    if n_groups < 1 or n_experts % n_groups:
        raise ValueError(f"n_groups {n_groups} does not divide {n_experts} experts")
    if n_ranks < 1 or not 1 <= n_nodes <= n_ranks:
        raise ValueError(f"n_ranks {n_ranks} and n_nodes {n_nodes}: at least one rank on each node")
    return n_experts


def _spread(experts: Sequence[int], weights: Sequence[float], sizes: Sequence[int]) -> tuple[int, ...]:
    """Slots of consecutive ranks of these sizes, filled with replicas of these experts."""
    copies = _replicate(experts, weights, sum(sizes), len(sizes))
    share = {e: weights[e] / n for e, n in copies.items()}
    # Replicas stand behind all first copies: of equal loads those of one expert are then packed apart.
    slots = [*experts, *(e for e, n in copies.items() for _ in range(n - 1))]
    packed = _pack(slots, [share[e] for e in slots], sizes)
    busiest = max(sum(share[e] for e in rank) for rank in packed)
    # Heuristics can lose by replicas (halves may fit worse than wholes), but not against this bound; only then compare.
    if len(slots) > len(experts) and busiest > _floor(experts, weights, len(sizes)):
        alone = _without_replicas(experts, weights, sizes)
        if max(sum(weights[e] for e in rank) for rank in alone) < busiest:
            packed = _fill(alone, sizes, weights)
    return tuple(e for rank in packed for e in rank)


def _floor(experts: Sequence[int], weights: Sequence[float], n_ranks: int) -> float:
    """No placement without replicas has a busiest rank below this."""
    load = [weights[e] for e in experts]
    return max(*load, sum(load) / n_ranks)


def _replicate(experts: Sequence[int], weights: Sequence[float], n_slots: int, n_ranks: int) -> dict[int, int]:
    """Expert -> replicas: each slot left over goes to the expert with the most load per replica.

    More replicas than ranks help nobody, so they are given only when every expert has one on each rank.
    """
    copies = dict.fromkeys(experts, 1)
    heap = [(-weights[e], e) for e in experts]
    heapify(heap)
    for _ in range(n_slots - len(experts)):
        e = heap[0][1]
        copies[e] += 1
        if copies[e] % n_ranks:
            heapreplace(heap, (-weights[e] / copies[e], e))
        elif len(heap) > 1:
            heappop(heap)
        else:
            heap = [(-weights[e] / copies[e], e) for e in experts]
            heapify(heap)
    return copies


def _pack(items: Sequence[int], weights: Sequence[float], sizes: Sequence[int]) -> list[list[int]]:
    """Items in packs of these sizes: the heaviest first, each to the lightest pack that has room.

    `weights` go with the positions of `items`. Of equally light packs the one with least room comes first: it can
    balance a heavy item least with light ones later.
    """
    packs: list[list[int]] = [[] for _ in sizes]
    heap = [(0.0, size, i) for i, size in enumerate(sizes) if size]
    heapify(heap)
    for at in sorted(range(len(items)), key=weights.__getitem__, reverse=True):
        weight, room, i = heap[0]
        packs[i].append(items[at])
        if room > 1:
            heapreplace(heap, (weight + weights[at], room - 1, i))
        else:
            heappop(heap)
    return packs


def _without_replicas(experts: Sequence[int], weights: Sequence[float], sizes: Sequence[int]) -> list[list[int]]:
    """Each expert once, on ranks that have room for more: what no replicas at all would give."""
    small = [len(r) for r in cut(len(experts), len(sizes))]
    packed = _pack(experts, [weights[e] for e in experts], small)
    by_room = sorted(range(len(sizes)), key=sizes.__getitem__)
    by_need = sorted(range(len(sizes)), key=small.__getitem__)
    result: list[list[int]] = [[] for _ in sizes]
    for to, source in zip(by_room, by_need, strict=True):
        result[to] = packed[source]
    return result


def _fill(packed: list[list[int]], sizes: Sequence[int], weights: Sequence[float]) -> list[list[int]]:
    """Fill the slots left over with second copies of what the rank holds: no rank's load changes.

    An empty rank gets one of the heaviest expert's replicas, which lightens others and is not heavier than they are.
    """
    copies = Counter(e for rank in packed for e in rank)
    result = []
    for rank, size in zip(packed, sizes, strict=True):
        own = rank or [max(copies, key=lambda e: weights[e] / copies[e])]
        copies.update(() if rank else own)
        result.append([own[i % len(own)] for i in range(size)])
    return result


def _shares(placement: Placement, replicas: Sequence[int], width: int) -> list[dict[int, int]]:
    """[source rank] -> slot -> tokens, of `width` tokens that each rank sends: near before far, and all slots even."""
    room = {slot: len(part) for slot, part in zip(replicas, cut(placement.n_ranks * width, len(replicas)), strict=True)}
    left = [width] * placement.n_ranks
    shares: list[dict[int, int]] = [{} for _ in left]

    def send(rank: int, slot: int) -> None:
        n = min(left[rank], room[slot])
        if n:
            left[rank] -= n
            room[slot] -= n
            shares[rank][slot] = shares[rank].get(slot, 0) + n

    home = {slot: placement.rank_of_slot[slot] for slot in replicas}
    for slot, rank in home.items():
        send(rank, slot)
    for slot, rank in home.items():
        for peer in placement.ranks_of_node[placement.node_of_rank[rank]]:
            send(peer, slot)
    sources = iter(range(placement.n_ranks))
    rank = next(sources)
    for slot in replicas:
        while room[slot]:
            while not left[rank]:
                rank = next(sources)
            send(rank, slot)
    return shares


def _in_turn(share: dict[int, int]) -> tuple[int, ...]:
    """Each slot as often as its share says, spread over the row: 3 of a and 1 of b are a a b a, not a a a b."""
    places = sorted(((i + 0.5) / n, slot) for slot, n in share.items() for i in range(n))
    return tuple(slot for _, slot in places)


def _slots_by_expert(slots: Sequence[int], n_experts: int) -> tuple[tuple[int, ...], ...]:
    found: list[list[int]] = [[] for _ in range(n_experts)]
    for slot, expert in enumerate(slots):
        found[expert].append(slot)
    return tuple(map(tuple, found))
