"""Logical experts become slots, every token is counted once, and the parts of a layer are what run() does."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from brigade.core.placement import Placement, initial, place
from brigade.engine.config import DEMO_MODEL
from brigade.model.spread import WIDTH, Spread, Table
from brigade.spec.config import read_spec

SPEC = read_spec(DEMO_MODEL)
assert SPEC.moe is not None
E, K, FIRST, L = SPEC.moe.n_experts, SPEC.moe.top_k, SPEC.n_dense, SPEC.n_layers - SPEC.n_dense


def some_ids(n: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.random((n, E)).argsort(1)[:, :K].astype(np.int32))


def skewed(n_slots: int, n_ranks: int) -> Placement:
    rng = random.Random(3)
    load = [[rng.paretovariate(1.1) for _ in range(E)] for _ in range(L)]
    return place(load, n_slots=n_slots, n_groups=1, n_nodes=1, n_ranks=n_ranks)


class OneRank:
    """An exchange of one rank that holds all slots, which remembers what it was offered."""

    def start_dispatch(self, lane: int, x_TD: Tensor, slots_TK: Tensor) -> None:
        self.x_TD, self.slots_TK = x_TD, slots_TK

    def finish_dispatch(self, lane: int) -> tuple[Tensor, Tensor]:
        self.pairs = (self.slots_TK.flatten() >= 0).nonzero().flatten()
        return self.x_TD[self.pairs // self.slots_TK.shape[1]], self.slots_TK.flatten()[self.pairs]

    def start_combine(self, lane: int, y_ND: Tensor) -> None:
        self.y_ND = y_ND

    def finish_combine(self, lane: int) -> Tensor:
        out = torch.zeros(self.slots_TK.numel(), self.x_TD.shape[1])
        out[self.pairs] = self.y_ND
        return out.view(*self.slots_TK.shape, -1)


class TestTable:
    def test_without_replicas_it_names_the_one_slot(self) -> None:
        slots = Table([[3] * WIDTH, [1] * WIDTH, [0] * WIDTH]).slots(np.array([[0, 2], [1, 1]]))
        assert slots.tolist() == [[3, 0], [1, 1]]
        assert slots.dtype == np.int32

    def test_no_expert_is_no_slot_with_and_without_replicas(self) -> None:
        ids = np.array([[0, -1]] * 20)
        assert (Table([[3] * WIDTH]).slots(ids)[:, 1] == -1).all()
        assert (Table([[3, 4] * (WIDTH // 2)]).slots(ids)[:, 1] == -1).all()

    def test_tokens_take_turns_over_steps_of_one_token_too(self) -> None:
        table = Table([[5, 6, 7, 8] * (WIDTH // 4), [0] * WIDTH])
        one_by_one = [table.slots(np.array([[0, 1]])).tolist()[0] for _ in range(8)]
        assert one_by_one == [[5, 0], [6, 0], [7, 0], [8, 0]] * 2
        assert table.slots(np.zeros((6, 1), np.int64)).ravel().tolist() == [5, 6, 7, 8, 5, 6]
        assert table.slots(np.zeros((3, 1), np.int64)).ravel().tolist() == [7, 8, 5]

    def test_no_tokens_are_no_slots(self) -> None:
        assert Table([[5, 6] * (WIDTH // 2)]).slots(np.zeros((0, 4), np.int32)).shape == (0, 4)


def run(
    spread: Spread, layer: int, x_TD: Tensor, ids_TK: Tensor, compute: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    spread.offer(layer, x_TD, ids_TK)
    spread.give(compute(*spread.take()))
    return spread.results()


@pytest.mark.parametrize("redundant", [0, 3, E])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_every_row_goes_to_a_slot_that_holds_its_expert_and_comes_home(redundant: int, ids_dtype: torch.dtype) -> None:
    placement = skewed(E + redundant, 3)
    x_TD, ids_TK = torch.randn(50, 8), some_ids(50).to(ids_dtype)
    of_slot = torch.tensor(placement.phy2log[1])

    def compute(rows_ND: Tensor, slot_N: Tensor) -> Tensor:
        return rows_ND * (1 + of_slot[slot_N.long()])[:, None]

    used = set[int]()
    for rank in range(3):
        spread, exchange = Spread(SPEC, rank, placement), OneRank()
        spread.exchange = exchange
        y_TKD = run(spread, FIRST + 1, x_TD, ids_TK, compute)
        assert torch.equal(y_TKD, x_TD[:, None] * (1 + ids_TK.long())[:, :, None])
        used |= set(exchange.slots_TK.flatten().tolist())
    assert used == set(range(E + redundant)), "all replicas get tokens"


def test_own_tokens_are_counted_by_layer_and_expert_and_told_once() -> None:
    spread = Spread(SPEC, 0, initial(L, E, n_slots=E, n_ranks=2))
    spread.exchange = OneRank()
    ids_TK = some_ids(30)
    ids_TK[4] = -1
    run(spread, FIRST, torch.randn(30, 8), ids_TK, lambda rows, slots: rows)
    spread.count(FIRST + L - 1, some_ids(3))
    counts, received = spread.news()
    assert counts[0] == [int((ids_TK == e).sum()) for e in range(E)]
    assert [sum(layer) for layer in counts] == [29 * K] + [0] * (L - 2) + [3 * K]
    assert received == [29 * K] + [0] * (L - 1)
    assert spread.news() == ([[0] * E] * L, [0] * L)


def test_a_rank_that_holds_all_experts_counts_and_exchanges_nothing() -> None:
    spread = Spread(SPEC)
    spread.count(FIRST, some_ids(7))
    assert sum(map(sum, spread.news()[0])) == 7 * K
    with pytest.raises(RuntimeError, match="all experts are on this rank"):
        spread.take()
