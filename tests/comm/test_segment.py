"""What a segment promises without a second process."""

import os
import subprocess
import sys
import time

import pytest
import torch

from brigade.comm.group import Alone, PeerLost
from brigade.comm.segment import Flag, Segment
from brigade.comm.shared import SharedExchange, SharedGroup
from brigade.comm.wire import wire


def made(n_ranks: int = 1) -> Segment:
    return Segment.create(n_ranks, max_tokens=8, width=4, k=2)


def test_a_supervisor_that_makes_one_loads_no_torch_and_no_numpy() -> None:
    code = "import sys; from brigade.comm.segment import Segment; Segment.create(2, 8, 4, 2)"
    code += "; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_room_for_a_large_model_costs_only_what_is_touched() -> None:
    before = set(os.listdir("/dev/shm"))
    segment = Segment.create(8, max_tokens=4096, width=7168, k=8)
    assert segment.shape.size > 1 << 36
    assert os.fstat(segment.fd).st_blocks * 512 < 1 << 20
    assert set(os.listdir("/dev/shm")) == before
    segment.close()


def test_attaching_reads_the_shape_and_refuses_other_files() -> None:
    segment = made(3)
    assert Segment.attach(segment.fd).shape == segment.shape
    other = os.memfd_create("other")
    os.ftruncate(other, 4096)
    with pytest.raises(ValueError, match="not a segment"):
        Segment.attach(other)
    os.close(other)


def test_those_who_do_not_come_are_named_all_of_them_and_only_them() -> None:
    segment = made(4)
    segment.post(0, Flag.SHARE, 1, 1)
    segment.post(2, Flag.SHARE, 1, 5)
    start = time.monotonic()
    with pytest.raises(PeerLost, match=r"ranks 1, 3: did not arrive within 0\.1 s") as e:
        segment.wait(range(4), Flag.SHARE, 1, 1, 0.1)
    assert e.value.ranks == (1, 3)
    assert 0.1 <= time.monotonic() - start < 0.3


def test_flags_of_an_older_generation_count_for_nothing() -> None:
    segment = made(2)
    segment.post(0, Flag.SHARE, 1, 1000)
    segment.post(1, Flag.SHARE, 2, 1)
    with pytest.raises(PeerLost) as e:
        segment.wait(range(2), Flag.SHARE, 2, 1, 0.05)
    assert e.value.ranks == (0,)


def test_generations_come_one_after_the_other() -> None:
    segment = made()
    group = SharedGroup(segment, 0, deadline=1)
    with pytest.raises(RuntimeError, match="share before form"):
        group.share([1])
    with pytest.raises(ValueError, match="generation: 1 is due"):
        group.form(2)
    group.form(1)
    segment.stop(1, [0])
    with pytest.raises(PeerLost, match="generation 1 of the group was stopped"):
        group.share([1])
    group.form(2)
    assert group.share([1]) == [(1,)]
    with pytest.raises(PeerLost):
        group.form(1)
    with pytest.raises(ValueError, match="generation: must be 1 to"):
        segment.stop(0)


def test_an_exchange_refuses_what_does_not_fit() -> None:
    group = SharedGroup(made(), 0, deadline=1)
    group.form(1)
    exchange = SharedExchange(group, (0, 5), wire("auto", 4, torch.float32))
    x, slots = torch.zeros(2, 4), torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"x: need torch.float32 \[T, 4\]"):
        exchange.start_dispatch(0, x.bfloat16(), slots)
    with pytest.raises(ValueError, match=r"slots: need int32 \[2, 2\]"):
        exchange.start_dispatch(0, x, slots.long())
    with pytest.raises(ValueError, match="slots: must be -1 or below 5, not 0"):
        exchange.start_dispatch(0, x, slots.index_fill(0, torch.tensor([1]), 5))
    with pytest.raises(ValueError, match="room for 8 tokens"):
        exchange.start_dispatch(0, torch.zeros(9, 4), torch.zeros(9, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="lane: there are lanes 0 to 1"):
        exchange.start_dispatch(2, x, slots)
    with pytest.raises(RuntimeError, match="finish_dispatch called where start_dispatch is due"):
        exchange.finish_dispatch(0)
    exchange.start_dispatch(0, x, slots)
    rows, _ = exchange.finish_dispatch(0)
    with pytest.raises(ValueError, match=r"y: need float32 \[4, 4\]"):
        exchange.start_combine(0, rows[:3])
    exchange.start_combine(0, rows)
    assert exchange.finish_combine(0).shape == (2, 2, 4)


@pytest.mark.parametrize("bounds", [(0,), (0, 5, 3), (1, 5), (0, 1, 2, 3)])
def test_bounds_must_give_each_rank_a_range(bounds: tuple[int, ...]) -> None:
    group = SharedGroup(made(), 0, deadline=1)
    with pytest.raises(ValueError, match="bounds: 1 ranks need 2 ascending numbers from 0"):
        SharedExchange(group, bounds, wire("auto", 4, torch.float32))


@pytest.mark.parametrize("deadline", [0, -1, float("inf"), float("nan")])
def test_no_group_waits_for_ever(deadline: float) -> None:
    with pytest.raises(ValueError, match="deadline"):
        SharedGroup(made(), 0, deadline=deadline)


def test_one_rank_alone_shares_with_itself() -> None:
    assert Alone().share([1, 2]) == [(1, 2)]
    with pytest.raises(ValueError, match="up to 64"):
        Alone().share([0] * 65)
