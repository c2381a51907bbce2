"""How one placement of experts becomes another, with little to move and never a layer in between. Pure.

Life of a change:
1. settle: the new placement's slots are renumbered, which changes no rank's load, to be close to the old ones.
2. where_it_pays: layers that would gain too little stay as they are.
3. moves: the slots that change hands.
4. portions: a few layers at a time. The engine moves one portion's weights between two steps.
5. after: the placement that holds from then on; a layer is always wholly old or wholly new.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

from brigade.core.placement import Loads, Placement, rank_loads


class Move(NamedTuple):
    """From now on, this slot holds this expert."""

    layer: int
    slot: int
    expert: int


def settle(old: Placement, new: Placement) -> Placement:
    """`new` with its slots renumbered so that few of them differ from `old`; every rank's load stays somebody's.

    What a rank would hold may go to another rank (within a node, and whole nodes change places, where experts are
    packed to nodes), and within a rank every expert that stays keeps its slot. Ranks are matched greedily by what they
    have in common: not always the best matching, never worse than leaving all ranks where they are.
    """
    if (old.n_experts, old.n_ranks, old.n_nodes, old.n_layers, old.n_slots) != (
        new.n_experts,
        new.n_ranks,
        new.n_nodes,
        new.n_layers,
        new.n_slots,
    ):
        raise ValueError("only placements of the same layers, experts, slots, ranks and nodes can be settled")
    areas = new.ranks_of_node if new.by_node else (range(new.n_ranks),)
    layers = []
    for was, will in zip(old.phy2log, new.phy2log, strict=True):
        old_ranks = [was[s.start : s.stop] for s in new.slots_of_rank]
        new_ranks = [will[s.start : s.stop] for s in new.slots_of_rank]
        old_areas = [old_ranks[a.start : a.stop] for a in areas]
        new_areas = [new_ranks[a.start : a.stop] for a in areas]
        source = _match(
            [sum(a, ()) for a in old_areas], [sum(a, ()) for a in new_areas], [_sizes(a) for a in new_areas]
        )
        slots: list[int] = []
        for held, comes in zip(old_areas, (new_areas[i] for i in source), strict=True):
            order = _match(held, comes, _sizes(comes))
            for before, i in zip(held, order, strict=True):
                slots += _keep(before, comes[i])
        layers.append(tuple(slots))
    return replace(new, phy2log=tuple(layers))


def where_it_pays(old: Placement, new: Placement, load_LE: Loads, *, gain: float = 0.05) -> Placement:
    """`new`, but with the old slots in layers whose busiest rank would not have at least this share less to do.

    Two nearly equal placements of a layer may have nothing in common, and moving weights is never free.
    """
    if old.by_node != new.by_node:
        raise ValueError("one placement packs experts to nodes and the other does not")
    layers = zip(old.phy2log, rank_loads(load_LE, old), new.phy2log, rank_loads(load_LE, new), strict=True)
    return replace(
        new,
        phy2log=tuple(
            will if max(load_then) <= (1 - gain) * max(load_now) and any(load_now) else was
            for was, load_now, will, load_then in layers
        ),
    )


def moves(old: Placement, new: Placement) -> list[Move]:
    """The slots that change hands, by layer and slot. Settle first, or nearly all of them do."""
    return [
        Move(layer, slot, b)
        for layer, (was, will) in enumerate(zip(old.phy2log, new.phy2log, strict=True))
        for slot, (a, b) in enumerate(zip(was, will, strict=True))
        if a != b
    ]


def portions(all_moves: Iterable[Move], n_layers: int) -> Iterator[tuple[Move, ...]]:
    """Cut moves into portions of at most `n_layers` layers that change, never within a layer.

    Within a portion every source must be read before any slot is written: two slots may change places.
    """
    if n_layers < 1:
        raise ValueError("a portion needs at least one layer")
    portion: list[Move] = []
    for i, (_, of_layer) in enumerate(groupby(all_moves, key=lambda m: m.layer)):
        if i and i % n_layers == 0:
            yield tuple(portion)
            portion = []
        portion += of_layer
    if portion:
        yield tuple(portion)


def after(placement: Placement, portion: Iterable[Move]) -> Placement:
    """The placement once these moves are made."""
    layers = [list(slots) for slots in placement.phy2log]
    for layer, slot, expert in portion:
        layers[layer][slot] = expert
    return replace(placement, phy2log=tuple(map(tuple, layers)))


def _sizes(parts: Sequence[Sequence[object]]) -> tuple[int, ...]:
    return tuple(map(len, parts))


def _match(old: Sequence[tuple[int, ...]], new: Sequence[tuple[int, ...]], kinds: Sequence[object]) -> list[int]:
    """For each place, which of `new` comes there, so that much of `old` stays. Places change only within their kind."""
    where: dict[int, Counter[int]] = {}
    for i, held in enumerate(old):
        for e in held:
            where.setdefault(e, Counter())[i] += 1
    common = []
    in_place = 0
    for j, comes in enumerate(new):
        shared: Counter[int] = Counter()
        for e, n in Counter(comes).items():
            for i, m in where.get(e, {}).items():
                shared[i] += min(n, m)
        in_place += shared[j]
        common += [(-n, i != j, i, j) for i, n in shared.items() if kinds[i] == kinds[j]]
    source: dict[int, int] = {}
    used: set[int] = set()
    kept = 0
    for n, _, i, j in sorted(common):
        if i not in source and j not in used:
            source[i] = j
            used.add(j)
            kept -= n
    if kept <= in_place:
        return list(range(len(new)))
    free: dict[object, list[int]] = {}
    for j in range(len(new)):
        if j not in used:
            free.setdefault(kinds[j], []).append(j)
    return [source[i] if i in source else free[kinds[i]].pop() for i in range(len(old))]


def _keep(before: tuple[int, ...], comes: tuple[int, ...]) -> list[int]:
    """`comes`, reordered so that what was there before keeps its slot."""
    left = Counter(comes)
    stays = []
    for e in before:
        stays.append(left[e] > 0)
        left[e] -= stays[-1]
    rest = left.elements()
    return [e if same else next(rest) for e, same in zip(before, stays, strict=True)]
