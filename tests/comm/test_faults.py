"""A rank that dies or freezes in mid exchange: the others name it in time, and the group can be formed anew."""

import signal
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.comm.oracle import Case
from tests.comm.pool import WIDTH, K, Pool

SIZE = 3
DEADLINE = 1.0
CASE = asdict(Case(5, (4, 5, 6), (0, 2, 4, 6), WIDTH, K))
BACKENDS = ["shared", "distributed", "mesh", "hosts"]


def exchange_until_lost(pool: Pool, tmp_path: Path) -> None:
    """All ranks exchange without end; returns when the last of them has done one round."""
    started = tmp_path / "started"
    for rank in range(SIZE):
        pool.tell(rank, do="until_lost", case=CASE, started=str(started) if rank == SIZE - 1 else "")
    until = time.monotonic() + 20
    while not started.exists():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_is_named_within_the_deadline(pool: Pool, tmp_path: Path, backend: str, victim: int) -> None:
    pool.open(backend, SIZE, DEADLINE)
    exchange_until_lost(pool, tmp_path)
    pool.kill(victim)
    for answer in pool.hear_all([r for r in range(SIZE) if r != victim], 10):
        assert answer["ok"]["lost"] == [victim], answer
        assert f"rank {victim}" in answer["ok"]["text"]
        assert answer["ok"]["seconds"] < DEADLINE + 0.5
    pool.replace(victim)
    pool.open(backend, SIZE)
    assert pool.all(SIZE, do="run", cases=[CASE]) == [{"ok": "equal"}] * SIZE


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_rank_is_named_within_the_deadline(pool: Pool, tmp_path: Path, backend: str) -> None:
    pool.open(backend, SIZE, DEADLINE)
    exchange_until_lost(pool, tmp_path)
    pool.kill(1, signal.SIGSTOP)
    try:
        for answer in pool.hear_all([0, 2], 10):
            assert answer["ok"]["lost"] == [1], answer
            assert answer["ok"]["seconds"] < DEADLINE + 0.5
    finally:
        pool.kill(1, signal.SIGCONT)
    assert "lost" in pool.hear(1, 10)["ok"], "it sees that the others gave it up when it goes on"
    pool.open(backend, SIZE)
    assert pool.all(SIZE, do="run", cases=[CASE]) == [{"ok": "equal"}] * SIZE


def test_a_stop_ends_every_wait_at_once_and_names_the_culprit(pool: Pool, tmp_path: Path) -> None:
    pool.open("shared", SIZE, deadline=60)
    exchange_until_lost(pool, tmp_path)
    pool.kill(2)
    segment = pool.segments[SIZE]
    start = time.monotonic()
    segment.stop(segment.stopped + 1, [2])
    for answer in pool.hear_all([0, 1], 10):
        assert answer["ok"]["lost"] == [2]
    assert time.monotonic() - start < 0.5
    pool.replace(2)
    for rank in (0, 1):
        pool.tell(rank, do="form", generation=segment.stopped + 1)
    pool.tell(
        2, do="open", backend="shared", rank=2, size=SIZE, deadline=5, fd=segment.fd, generation=segment.stopped + 1
    )
    assert [a["ok"] for a in pool.hear_all(range(SIZE))] == ["formed", "formed", "open"]
    assert pool.all(SIZE, do="run", cases=[CASE, CASE]) == [{"ok": "equal"}] * SIZE


def test_a_rank_that_never_forms_is_named(pool: Pool) -> None:
    segment = pool.segments[SIZE]
    segment.stop(segment.stopped + 1)
    for rank in (0, 2):
        pool.tell(
            rank,
            do="open",
            backend="shared",
            rank=rank,
            size=SIZE,
            deadline=0.5,
            fd=segment.fd,
            generation=segment.stopped + 1,
        )
    assert [a["lost"] for a in pool.hear_all([0, 2], 5)] == [[1], [1]]
    for rank in (0, 2):
        pool.tell(
            rank,
            do="open",
            backend="distributed",
            rank=rank,
            size=SIZE,
            deadline=0.5,
            path=str(pool.directory / "store"),
            prefix="never",
        )
    assert [a["lost"] for a in pool.hear_all([0, 2], 5)] == [[1], [1]]
