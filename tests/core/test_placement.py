"""Placement of experts: every expert somewhere, loads even, and a change that moves little and never tears a layer."""

import random
from collections import Counter
from itertools import permutations

import pytest

from brigade.core.moves import Move, after, moves, portions, settle, where_it_pays
from brigade.core.placement import (
    Loads,
    Placement,
    busiest_over_mean,
    cut,
    initial,
    place,
    rank_loads,
    replicas_for,
)

EXAMPLE = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
"""The loads in the readme of deepseek-ai/EPLB: 2 layers of 12 experts in 4 groups."""

SEEDS = range(40)


def skewed(rng: random.Random, n_layers: int, n_experts: int) -> list[list[float]]:
    kinds = [
        lambda: rng.paretovariate(1.1),
        lambda: float(rng.randrange(5)),
        rng.random,
        lambda: 1.0,
        lambda: rng.choice([0.0, 0.0, 100.0]),
    ]
    return [[draw() for _ in range(n_experts)] for draw in rng.choices(kinds, k=n_layers)]


def drawn(seed: int) -> tuple[Loads, dict[str, int]]:
    """Loads and sizes of any kind: uneven ranks, more ranks than experts, more slots than replicas can use."""
    rng = random.Random(seed)
    n_groups, n_nodes = rng.choice([1, 2, 4, 6]), rng.choice([1, 2, 3])
    n_experts = n_groups * rng.randint(1, 8)
    n_ranks = n_nodes * rng.randint(1, 6) + rng.choice([0, 0, 1])
    n_slots = n_experts + rng.choice([0, 1, 3, n_experts, 3 * n_experts + 1])
    sizes = {"n_slots": n_slots, "n_groups": n_groups, "n_nodes": n_nodes, "n_ranks": n_ranks}
    return skewed(rng, 3, n_experts), sizes


def busiest(load_LE: Loads, placement: Placement) -> list[float]:
    return [max(x) for x in rank_loads(load_LE, placement)]


class TestPublishedExample:
    def test_gives_the_published_slots(self) -> None:
        placement = place(EXAMPLE, n_slots=16, n_groups=4, n_nodes=2, n_ranks=8)
        assert placement.phy2log == (
            (5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1),
            (7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1),
        )
        assert placement.by_node
        assert placement.log2phy[0][5] == (0, 2)

    def test_has_the_loads_that_can_be_added_up_by_hand(self) -> None:
        placement = place(EXAMPLE, n_slots=16, n_groups=4, n_nodes=2, n_ranks=8)
        assert rank_loads(EXAMPLE, placement)[0][:2] == (165 / 2 + 39, 165 / 2 + 4)
        assert busiest_over_mean(EXAMPLE, placement)[0] == pytest.approx((90 + 132 / 2) / (1033 / 8))

    def test_over_all_ranks_is_no_worse(self) -> None:
        hierarchical = place(EXAMPLE, n_slots=16, n_groups=4, n_nodes=2, n_ranks=8)
        whole = place(EXAMPLE, n_slots=16, n_groups=4, n_nodes=1, n_ranks=8)
        assert not whole.by_node
        assert max(busiest_over_mean(EXAMPLE, whole)) <= max(busiest_over_mean(EXAMPLE, hierarchical))


class TestPlace:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_fills_every_slot_and_leaves_no_expert_out(self, seed: int) -> None:
        loads, sizes = drawn(seed)
        placement = place(loads, **sizes)
        assert (placement.n_slots, placement.n_layers) == (sizes["n_slots"], len(loads))
        assert all(set(slots) == set(range(len(loads[0]))) for slots in placement.phy2log)
        assert sum(map(len, placement.slots_of_rank)) == sizes["n_slots"]
        assert len({len(s) for s in placement.slots_of_rank}) <= 2
        for layer, of_expert in enumerate(placement.log2phy):
            assert all(placement.phy2log[layer][s] == e for e, slots in enumerate(of_expert) for s in slots)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_with_replicas_is_never_worse_than_without(self, seed: int) -> None:
        loads, sizes = drawn(seed)
        n_experts = len(loads[0])
        alone = place(loads, **{**sizes, "n_slots": n_experts})
        pairs = zip(busiest(loads, place(loads, **sizes)), busiest(loads, alone), strict=True)
        assert all(many <= one * (1 + 1e-12) for many, one in pairs)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_keeps_groups_on_one_node_where_they_divide(self, seed: int) -> None:
        loads, sizes = drawn(seed)
        placement = place(loads, **sizes)
        n_nodes, n_groups = sizes["n_nodes"], sizes["n_groups"]
        assert placement.by_node == (n_nodes > 1 and n_groups % n_nodes == 0 and sizes["n_ranks"] % n_nodes == 0)
        if not placement.by_node:
            return
        for slots in placement.phy2log:
            nodes_of_group: dict[int, set[int]] = {}
            for slot, e in enumerate(slots):
                node = placement.node_of_rank[placement.rank_of_slot[slot]]
                nodes_of_group.setdefault(e * n_groups // len(loads[0]), set()).add(node)
            assert all(len(nodes) == 1 for nodes in nodes_of_group.values())
            assert set(Counter(n for (n,) in nodes_of_group.values()).values()) == {n_groups // n_nodes}

    def test_halves_that_fit_worse_than_wholes_are_not_used(self) -> None:
        # A second copy of expert 0 leaves three and a half experts to one rank; alone they are 7 + 6 on each.
        loads = [[7.0, 7.0, 6.0, 6.0]]
        assert busiest(loads, place(loads, n_slots=5, n_groups=1, n_nodes=1, n_ranks=2)) == [13.0]

    def test_splits_one_hot_expert_over_all_ranks(self) -> None:
        loads = [[1000.0, 1.0, 1.0, 1.0]]
        placement = place(loads, n_slots=8, n_groups=1, n_nodes=1, n_ranks=4)
        assert {placement.rank_of_slot[s] for s in placement.log2phy[0][0]} == {0, 1, 2, 3}
        assert busiest_over_mean(loads, placement)[0] < 1.01

    def test_counts_a_layer_without_load_as_even(self) -> None:
        placement = place([[0] * 8], n_slots=12, n_groups=2, n_nodes=2, n_ranks=4)
        assert max(Counter(placement.phy2log[0]).values()) == 2
        assert busiest_over_mean([[0] * 8], placement) == (1.0,)

    def test_leaves_ranks_without_slots_when_there_are_too_few(self) -> None:
        placement = place([[1.0, 2.0]], n_slots=2, n_groups=1, n_nodes=1, n_ranks=4)
        assert sorted(map(len, placement.slots_of_rank)) == [0, 0, 1, 1]

    @pytest.mark.parametrize(
        ("loads", "changes", "message"),
        [
            ([], {}, "at least one layer"),
            ([[1.0, 2.0], [1.0]], {}, "layer 1 are of 1 experts"),
            ([[1.0, -1.0]], {}, "layer 0 must be finite and not negative"),
            ([[1.0, float("nan")]], {}, "layer 0 must be finite"),
            ([[1.0, 1.0]], {"n_slots": 1}, "n_slots 1 cannot hold 2 experts"),
            ([[1.0, 1.0]], {"n_groups": 3}, "n_groups 3 does not divide 2 experts"),
            ([[1.0, 1.0]], {"n_ranks": 0}, "at least one rank"),
            ([[1.0, 1.0]], {"n_nodes": 3}, "at least one rank on each node"),
        ],
    )
    def test_says_which_size_cannot_be(self, loads: Loads, changes: dict[str, int], message: str) -> None:
        sizes = {"n_slots": 2, "n_groups": 1, "n_nodes": 1, "n_ranks": 2} | changes
        with pytest.raises(ValueError, match=message):
            place(loads, **sizes)


class TestPlacement:
    def test_without_loads_and_spare_slots_has_experts_in_order(self) -> None:
        placement = initial(2, 4, n_slots=4, n_ranks=3)
        assert placement.phy2log == ((0, 1, 2, 3),) * 2
        assert [list(s) for s in placement.slots_of_rank] == [[0], [1], [2, 3]]

    @pytest.mark.parametrize(("n_experts", "n_slots", "n_ranks"), [(60, 92, 8), (256, 288, 32), (8, 16, 4)])
    def test_without_loads_is_nearly_even_if_experts_are(self, n_experts: int, n_slots: int, n_ranks: int) -> None:
        placement = initial(1, n_experts, n_slots=n_slots, n_ranks=n_ranks)
        assert busiest_over_mean([[1.0] * n_experts], placement)[0] <= 1.13

    def test_without_loads_keeps_groups_on_their_nodes(self) -> None:
        for n_slots in (8, 12):
            placement = initial(1, 8, n_slots=n_slots, n_ranks=4, n_nodes=2, n_groups=4)
            assert placement.by_node
            assert set(placement.phy2log[0][: n_slots // 2]).isdisjoint(placement.phy2log[0][n_slots // 2 :])

    @pytest.mark.parametrize(("slots", "message"), [((0, 1, 1), r"experts \[2\]"), ((0, 1, 2, 7), r"experts \[7\]")])
    def test_must_hold_just_the_experts_that_are(self, slots: tuple[int, ...], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Placement(3, 1, 1, (slots,))

    def test_must_have_as_many_slots_in_each_layer(self) -> None:
        with pytest.raises(ValueError, match="layer 1 has 3 slots"):
            Placement(2, 1, 1, ((0, 1), (0, 1, 1)))

    @pytest.mark.parametrize(("total", "parts"), [(7, 3), (2, 5), (0, 2), (12, 4)])
    def test_parts_cover_everything_once(self, total: int, parts: int) -> None:
        assert [i for part in cut(total, parts) for i in part] == list(range(total))
        assert {len(part) for part in cut(total, parts)} <= {total // parts, -(-total // parts)}


class TestSettle:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_changes_no_load_and_never_adds_moves(self, seed: int) -> None:
        loads, sizes = drawn(seed)
        rng = random.Random(seed)
        old = place(skewed(rng, 3, len(loads[0])), **sizes)
        new = place(loads, **sizes)
        settled = settle(old, new)
        assert len(moves(old, settled)) <= len(moves(old, new))
        assert (settled.n_ranks, settled.by_node) == (new.n_ranks, new.by_node)
        for layer in range(new.n_layers):
            assert ranks_in(settled, layer) == ranks_in(new, layer)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_of_the_same_ranks_in_any_order_moves_nothing(self, seed: int) -> None:
        loads, sizes = drawn(seed)
        old = place(loads, **sizes)
        rng = random.Random(seed)
        assert moves(old, settle(old, shuffled(old, rng))) == []

    @pytest.mark.parametrize("seed", SEEDS)
    def test_comes_near_the_best_of_all_orders_of_ranks(self, seed: int) -> None:
        rng = random.Random(seed)
        sizes = {"n_slots": 10, "n_groups": 1, "n_nodes": 1, "n_ranks": 5}
        old, new = (place(skewed(rng, 1, 8), **sizes) for _ in range(2))
        before = [Counter(old.phy2log[0][s.start : s.stop]) for s in old.slots_of_rank]
        comes = [Counter(new.phy2log[0][s.start : s.stop]) for s in new.slots_of_rank]
        best = max(sum((a & b).total() for a, b in zip(before, order, strict=True)) for order in permutations(comes))
        kept = 10 - len(moves(old, settle(old, new)))
        assert best / 2 <= kept <= best

    def test_leaves_ranks_in_place_where_the_greedy_match_keeps_less(self) -> None:
        # New rank 1 has most in common with old rank 0 (2, 3, 4), but then new rank 0 has nothing in common with old 1.
        old = Placement(7, 2, 1, ((0, 1, 2, 3, 4, 5, 6, 5, 6, 5),))
        new = Placement(7, 2, 1, ((0, 1, 0, 1, 0, 2, 3, 4, 5, 6),))
        assert 10 - len(moves(old, settle(old, new))) == 4

    def test_refuses_placements_of_other_sizes(self) -> None:
        with pytest.raises(ValueError, match="same layers"):
            settle(initial(1, 4, n_slots=4, n_ranks=2), initial(1, 4, n_slots=5, n_ranks=2))


def ranks_in(placement: Placement, layer: int) -> list[object]:
    """What ranks hold, whatever their order; node by node where experts belong to nodes."""
    held = [tuple(sorted(placement.phy2log[layer][s.start : s.stop])) for s in placement.slots_of_rank]
    if not placement.by_node:
        return sorted(held)
    return sorted(tuple(sorted(held[r.start : r.stop])) for r in placement.ranks_of_node)


def shuffled(placement: Placement, rng: random.Random) -> Placement:
    """Slots within ranks, and ranks of one size within nodes, in another order."""
    layers = []
    for slots in placement.phy2log:
        held = [list(slots[s.start : s.stop]) for s in placement.slots_of_rank]
        for area in placement.ranks_of_node if placement.by_node else [range(placement.n_ranks)]:
            for size in {len(held[r]) for r in area}:
                same = [r for r in area if len(held[r]) == size]
                for r, content in zip(same, rng.sample([held[r] for r in same], len(same)), strict=True):
                    held[r] = rng.sample(content, size)
        layers.append(tuple(e for rank in held for e in rank))
    return Placement(placement.n_experts, placement.n_ranks, placement.n_nodes, tuple(layers), placement.by_node)


class TestMoves:
    OLD = Placement(2, 2, 1, ((0, 1), (0, 1), (0, 1), (0, 1)))
    NEW = Placement(2, 2, 1, ((1, 0), (0, 1), (1, 0), (1, 0)))

    def test_name_only_what_changes(self) -> None:
        assert moves(self.OLD, self.NEW)[:2] == [Move(0, 0, 1), Move(0, 1, 0)]
        assert {m.layer for m in moves(self.OLD, self.NEW)} == {0, 2, 3}

    def test_are_cut_between_layers(self) -> None:
        parts = list(portions(moves(self.OLD, self.NEW), 2))
        assert [sorted({m.layer for m in part}) for part in parts] == [[0, 2], [3]]
        assert list(portions([], 2)) == []
        with pytest.raises(ValueError, match="at least one layer"):
            next(portions([], 0))

    @pytest.mark.parametrize("n_layers", [1, 2, 5])
    def test_lead_to_the_new_placement_over_whole_layers(self, n_layers: int) -> None:
        now = self.OLD
        for part in portions(moves(self.OLD, self.NEW), n_layers):
            now = after(now, part)
            assert all(x in pair for x, *pair in zip(now.phy2log, self.OLD.phy2log, self.NEW.phy2log, strict=True))
        assert now == self.NEW


class TestWhereItPays:
    OLD = Placement(4, 2, 1, ((0, 1, 2, 3),) * 3)
    NEW = Placement(4, 2, 1, ((0, 2, 1, 3),) * 3)

    def test_takes_only_layers_whose_busiest_rank_gains_enough(self) -> None:
        loads = [[4.0, 4.0, 1.0, 1.0], [4.0, 3.9, 3.8, 3.8], [0.0] * 4]
        assert where_it_pays(self.OLD, self.NEW, loads).phy2log == (self.NEW.phy2log[0], *self.OLD.phy2log[1:])
        assert where_it_pays(self.OLD, self.NEW, loads, gain=0.01).phy2log[1] == self.NEW.phy2log[1]

    def test_does_not_mix_placements_by_node_with_others(self) -> None:
        by_node = Placement(4, 2, 2, ((0, 1, 2, 3),), by_node=True)
        with pytest.raises(ValueError, match="packs experts to nodes"):
            where_it_pays(initial(1, 4, n_slots=4, n_ranks=2, n_nodes=2), by_node, [[1.0] * 4])


class TestReplicasFor:
    @pytest.mark.parametrize("width", [1, 4, 8])
    @pytest.mark.parametrize("seed", SEEDS)
    def test_all_replicas_get_the_same_from_all_ranks(self, seed: int, width: int) -> None:
        loads, sizes = drawn(seed)
        placement = place(loads, **sizes)
        tables = [replicas_for(placement, 0, rank, width=width) for rank in range(placement.n_ranks)]
        for e, slots in enumerate(placement.log2phy[0]):
            assert all(len(table[e]) == width for table in tables)
            used = Counter(slot for table in tables for slot in table[e])
            assert set(used) <= set(slots)
            assert max(used.values()) - min(used[s] for s in slots) <= 1

    def test_own_replica_first_then_the_own_node_s(self) -> None:
        # Expert 0 is on ranks 0 and 2, one on each of two nodes of two ranks: nobody needs another node for it.
        placement = Placement(3, 4, 2, ((0, 1, 0, 2),))
        assert [replicas_for(placement, 0, rank, width=4)[0] for rank in range(4)] == [(0,) * 4] * 2 + [(2,) * 4] * 2

    def test_ranks_without_a_near_replica_take_what_is_left(self) -> None:
        # Expert 0 is on the second and third of three nodes of two ranks; each also serves one more rank.
        placement = Placement(5, 6, 3, ((1, 2, 0, 3, 0, 4),))
        assert [set(replicas_for(placement, 0, rank)[0]) for rank in range(6)] == [{2}, {4}, {2}, {2}, {4}, {4}]

    def test_a_rank_with_two_replicas_and_no_peers_uses_one_of_another_node_only_when_it_must(self) -> None:
        # Four replicas for three ranks, two of them on rank 0: each replica may get three quarters of a rank's tokens.
        placement = Placement(3, 3, 3, ((0, 0, 0, 1, 0, 2),))
        rows = [Counter(replicas_for(placement, 0, rank, width=8)[0]) for rank in range(3)]
        assert rows[0] == {0: 6, 1: 2}
        assert (rows[1][2], rows[2][4]) == (6, 6)

    def test_what_is_near_is_not_overloaded(self) -> None:
        # Both replicas of expert 0 are on the first node; the second node's ranks must share them evenly.
        placement = Placement(3, 4, 2, ((0, 0, 1, 2),))
        used = Counter(slot for rank in (2, 3) for slot in replicas_for(placement, 0, rank)[0])
        assert used == {0: 8, 1: 8}
        assert replicas_for(placement, 0, 1)[0] == (1,) * 8

    def test_takes_turns_evenly_along_a_row(self) -> None:
        placement = Placement(1, 1, 1, ((0, 0),))
        assert replicas_for(placement, 0, 0, width=4)[0] == (0, 1, 0, 1)
        with pytest.raises(ValueError, match="width"):
            replicas_for(placement, 0, 0, width=0)
