"""One rank's experts move: staged beside the steps, swapped or dropped when all agree, taken back when it must be."""

import queue
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from brigade.core.moves import Move
from brigade.core.placement import initial
from brigade.engine.config import DEMO_MODEL
from brigade.engine.messages import Portion, Settled, Staged
from brigade.engine.moving import Mover
from brigade.model.reread import ExpertFiles
from brigade.model.spread import Spread
from brigade.model.weights import BadCheckpoint, Checkpoint
from brigade.spec.config import read_spec

SPEC = read_spec(DEMO_MODEL)
assert SPEC.moe is not None
E, FIRST, L = SPEC.moe.n_experts, SPEC.n_dense, SPEC.n_layers - SPEC.n_dense
FILES = ExpertFiles(Checkpoint(Path(DEMO_MODEL), SPEC), torch.float32)


class Slots:
    """A model that knows of each own slot what it holds, and where: (layer, slot) -> place, a list with one tensor."""

    def __init__(self, rank: int) -> None:
        placement = initial(L, E, n_slots=E, n_ranks=2)
        self.slots = {
            (FIRST + layer, i): [FILES.read(FIRST + layer, placement.phy2log[layer][slot])[0]]
            for layer in range(L)
            for i, slot in enumerate(placement.slots_of_rank[rank])
        }
        self.spares: list[Any] = []

    def stage(self, layer: int, expert: tuple[Tensor, Tensor, Tensor], spare: Any) -> Any:
        self.spares.append(spare)
        place = [] if spare is None else spare
        place[:] = [expert[0]]
        return place

    def swap(self, layer: int, slot: int, place: Any) -> Any:
        old, self.slots[layer, slot] = self.slots[layer, slot], place
        return old

    def holds(self, layer: int, slot: int, expert: int) -> bool:
        return torch.equal(self.slots[FIRST + layer, slot][0], FILES.read(FIRST + layer, expert)[0])


class Rank:
    """Rank 1 of 2, and what it tells."""

    def __init__(self, files: Any = FILES) -> None:
        self.model = Slots(1)
        placement = initial(L, E, n_slots=E, n_ranks=2)
        self.spread = Spread(SPEC, 1, placement)
        self.mover = Mover(self.model, self.spread, files, 1, placement, 0, FIRST)
        self.told: queue.Queue[Staged | Settled] = queue.Queue()

    def stage(self, number: int, *moves: Move) -> Staged | Settled:
        self.mover.take(Portion(number, moves), self.told.put)
        return self.told.get(timeout=10)

    def agree(self, portion: int) -> Staged | Settled:
        self.mover.agreed(portion)()
        return self.told.get(timeout=10)

    def slot_of(self, layer: int, expert: int) -> int:
        return int(self.spread.tables[layer].slots(torch.tensor([[expert]]).numpy())[0, 0])


HALF = E // 2
EXCHANGE = (Move(1, 2, HALF), Move(1, HALF, 2))
"""Expert 2 of rank 0 and the first expert of rank 1 change places in the second layer with experts."""


def test_staging_changes_nothing_until_all_have_agreed() -> None:
    rank = Rank()
    assert rank.stage(4, *EXCHANGE) == Staged(4)
    assert rank.mover.staged == 4
    assert rank.model.holds(1, 0, HALF)
    assert (rank.slot_of(1, 2), rank.mover.number) == (2, 0)

    assert rank.agree(4) == Settled(4, True)
    assert rank.mover.staged == 0
    assert rank.model.holds(1, 0, 2)
    assert (rank.slot_of(1, 2), rank.slot_of(1, HALF), rank.slot_of(0, 2)) == (HALF, 2, 2)
    assert (rank.mover.number, rank.mover.placement.phy2log[1][HALF]) == (4, 2)


def test_what_another_rank_could_not_read_is_dropped_here_too() -> None:
    rank = Rank()
    rank.stage(1, *EXCHANGE)
    assert rank.agree(-1) == Settled(1, False)
    assert rank.model.holds(1, 0, HALF)
    assert (rank.mover.staged, rank.mover.number, rank.slot_of(1, 2)) == (0, 0, 2)


def test_a_problem_is_told_and_nothing_moves(caplog: pytest.LogCaptureFixture) -> None:
    class Gone:
        def read(self, layer: int, expert: int) -> None:
            raise BadCheckpoint("model.safetensors: cannot be opened again")

    rank = Rank(Gone())
    assert rank.stage(1, *EXCHANGE) == Staged(1, "model.safetensors: cannot be opened again")
    assert rank.mover.staged == -1
    assert rank.agree(-1) == Settled(1, False)
    assert "model.safetensors" in caplog.text
    assert rank.model.holds(1, 0, HALF)


def test_memory_that_was_swapped_out_or_dropped_is_used_for_the_next_portion() -> None:
    rank = Rank()
    rank.stage(1, *EXCHANGE)
    rank.agree(1)
    rank.stage(2, Move(1, 2, 2), Move(1, HALF, HALF))
    rank.agree(-2)
    rank.stage(3, Move(1, 2, 2), Move(1, HALF, HALF))
    rank.agree(3)
    assert rank.model.spares[0] is None
    assert all(spare is not None for spare in rank.model.spares[1:])
    assert rank.model.holds(1, 0, HALF)
    assert rank.mover.placement == initial(L, E, n_slots=E, n_ranks=2)


class TestAfterALoss:
    """Ranks may have come to different ends; all are told which portion holds."""

    def test_one_that_made_a_portion_that_does_not_hold_takes_it_back(self) -> None:
        rank = Rank()
        rank.stage(7, *EXCHANGE)
        rank.agree(7)
        rank.mover.hold(0)
        assert rank.model.holds(1, 0, HALF)
        assert (rank.mover.number, rank.slot_of(1, 2)) == (0, 2)
        rank.mover.hold(0)
        assert rank.mover.placement == initial(L, E, n_slots=E, n_ranks=2)

    def test_one_that_missed_a_portion_that_holds_makes_it(self) -> None:
        rank = Rank()
        rank.stage(7, *EXCHANGE)
        rank.mover.hold(7)
        assert (rank.mover.staged, rank.mover.number) == (0, 7)
        assert rank.model.holds(1, 0, 2)
        assert rank.slot_of(1, 2) == HALF

    def test_what_was_being_staged_is_forgotten(self) -> None:
        rank = Rank()
        rank.stage(7, *EXCHANGE)
        rank.mover.hold(0)
        assert rank.mover.staged == 0
        assert rank.stage(8, *EXCHANGE) == Staged(8)
        assert rank.agree(8) == Settled(8, True)

    def test_one_that_cannot_get_there_says_so(self) -> None:
        with pytest.raises(ValueError, match="after portion 0 of moves, not 3"):
            Rank().mover.hold(3)


def test_a_loop_that_ends_leaves_no_thread_behind() -> None:
    rank = Rank()
    rank.mover.take(Portion(1, EXCHANGE * 20), rank.told.put)
    rank.mover.close()
    assert "staging" not in {t.name for t in threading.enumerate() if t.is_alive()}


def test_an_agreement_about_something_else_is_a_bug_that_shows() -> None:
    rank = Rank()
    rank.stage(2, *EXCHANGE)
    with pytest.raises(ValueError, match="portion 3 of moves, which this rank has not staged"):
        rank.mover.agreed(3)
