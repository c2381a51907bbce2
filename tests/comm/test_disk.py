"""The disk store in the background: rows come back as they were or not at all, and a bad disk holds nobody up."""

import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brigade.comm.kv import disk, entry, troubles
from brigade.comm.kv.disk import DiskStore, Filled
from brigade.comm.kv.entry import Form
from brigade.comm.kv.folder import Folder
from brigade.comm.kv.rows import Rows
from brigade.core.keys import keys

LAYERS, PAGE, N_PAGES, ROW, STEP = 2, 2, 24, 16, 4
TOKENS = list(range(20))
PAGES = [7, 3, 4, 11, 5, 9, 0, 1, 2, 10]
FORM = Form(LAYERS, STEP, ROW, b"i" * 16)


class Store(DiskStore):
    """A store with a cache of random rows, over a folder that a test may break."""

    def __init__(self, path: Path, seed: int = 1, n_entries: int = 100) -> None:
        memory = np.random.default_rng(seed).integers(0, 256, LAYERS * N_PAGES * PAGE * ROW, np.uint8)
        super().__init__(Folder(str(path), n_entries * FORM.size, FORM), Rows(memory, LAYERS, PAGE, ROW))
        assert self.opened.wait(5)

    def tokens(self, pages: list[int], start: int, end: int) -> bytes:
        runs = [run for x in range(LAYERS) for run in self.rows.runs(x, pages, start, end)]
        return b"".join(run.tobytes() for run in runs)

    def keep(self, tokens: list[int] = TOKENS, still: Callable[[int, int], bool] = lambda a, b: True) -> None:
        """Write the rows of these tokens, and wait for it."""
        self.write(names(tokens), PAGES, still)
        if self._may("write"):
            done = threading.Event()
            self.write(iter(lambda: done.set() or b"", b""), [], still)
            assert done.wait(5)

    def fill(self, pages: list[int], start: int = 0, tokens: list[int] = TOKENS) -> Filled:
        n = self.known(names(tokens))
        self.read(1, names(tokens), pages, start, n * STEP)
        return self.ended()

    def ended(self) -> Filled:
        out: list[Filled] = []
        self.wait_until(lambda: bool(out.extend(self.poll()) or out))
        (one,) = out
        return one

    @staticmethod
    def wait_until(true: Callable[[], bool]) -> None:
        until = time.monotonic() + 5
        while not true():
            assert time.monotonic() < until
            time.sleep(0.001)


def names(tokens: list[int] = TOKENS) -> Iterator[bytes]:
    return keys(b"model", "", tokens, STEP)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Store]]:
    made: list[Store] = []

    def start(**how: Any) -> Store:
        made.append(Store(tmp_path, **how))
        return made[-1]

    yield start
    for store in made:
        store.close()


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_rows_of_an_earlier_life_fill_other_pages(make: Callable[..., Store]) -> None:
    first = make()
    first.keep()
    second = make(seed=2)
    pages = [20, 21, 1, 2, 3, 17, 12, 13, 14, 15]
    before = second.rows.memory.copy()
    assert second.fill(pages) == Filled(1, 20)
    assert second.tokens(pages, 0, 20) == first.tokens(PAGES, 0, 20)
    others = [p for p in range(N_PAGES) if p not in pages]
    untouched = before.reshape(LAYERS, N_PAGES, -1)[:, others]
    assert np.array_equal(second.rows.memory.reshape(LAYERS, N_PAGES, -1)[:, others], untouched)
    assert not second.pending
    assert second.counts.read_bytes == 5 * FORM.size


@pytest.mark.parametrize("start", [2, 4, 6, 18])
def test_pages_before_the_start_are_not_written(make: Callable[..., Store], start: int) -> None:
    first = make()
    first.keep()
    second = make(seed=2)
    before = second.tokens(PAGES, 0, start)
    assert second.fill(PAGES, start) == Filled(1, 20)
    assert second.tokens(PAGES, 0, start) == before
    assert second.tokens(PAGES, start, 20) == first.tokens(PAGES, start, 20)


@pytest.mark.parametrize("gone", range(5))
def test_what_is_missing_ends_it_there(make: Callable[..., Store], caplog: pytest.LogCaptureFixture, gone: int) -> None:
    store = make()
    store.keep()
    store.folder.file(list(names())[gone]).unlink()
    assert store.fill(PAGES) == Filled(1, gone * STEP)
    assert store.known(names()) == gone
    assert lines(caplog) == []
    assert store.well


def test_what_is_damaged_ends_it_there_with_one_line(
    make: Callable[..., Store], caplog: pytest.LogCaptureFixture
) -> None:
    store = make()
    store.keep()
    path = store.folder.file(list(names())[2])
    os.truncate(path, 100)
    assert store.fill(PAGES) == Filled(1, 8)
    assert [str(path) in line for line in lines(caplog)] == [True]
    assert (store.counts.damaged, store.well) == (1, True)
    store.keep()
    assert store.fill(PAGES) == Filled(1, 20)


def test_tokens_that_differ_are_not_found(make: Callable[..., Store]) -> None:
    store = make()
    store.keep()
    assert [store.known(names([*TOKENS[:n], 99, *TOKENS[n + 1 :]])) for n in (0, 4, 11, 19)] == [0, 1, 2, 4]
    assert store.known(keys(b"model", "tenant", TOKENS, STEP)) == 0


def test_pages_that_were_used_again_are_not_kept(make: Callable[..., Store]) -> None:
    store = make()
    asked: list[tuple[int, int]] = []

    def still(a: int, b: int) -> bool:
        asked.append((a, b))
        return (a, b) != (2, 4) and not ((a, b) == (4, 6) and asked.count((4, 6)) == 2)

    store.keep(still=still)
    assert [k in store.folder for k in names()] == [True, False, False, True, True]
    assert store.counts.dropped == 1
    store.keep()
    assert store.known(names()) == 5


class Stuck:
    """A disk that does not answer until it is let go."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.read = threading.Event(), store.folder.read
        monkeypatch.setattr(store.folder, "read", self)

    def __call__(self, *args: Any) -> None:
        assert self.go.wait(10)
        self.read(*args)


def test_a_disk_that_does_not_answer_is_given_up_and_writes_nothing_later(
    make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(disk, "STALL", 0.05)
    monkeypatch.setattr(troubles, "PAUSE", 0.0)
    make().keep()
    store = make(seed=2)
    before = store.rows.memory.copy()
    stuck = Stuck(store, monkeypatch)
    began = time.monotonic()
    assert store.fill(PAGES) == Filled(1, 0)
    assert time.monotonic() - began < 1
    assert store.known(names()) == 0, "nothing more is asked of a disk that does not answer"
    assert not store.well
    assert store.counts.late == 1
    stuck.go.set()
    store.wait_until(lambda: store.known(names()) > 0)
    assert np.array_equal(store.rows.memory, before)
    assert store.fill(PAGES) == Filled(1, 20)
    assert ["has not answered" in line for line in lines(caplog)] == [True, False]
    assert "works again" in lines(caplog)[1]


def test_a_request_that_leaves_is_not_written_any_more(
    make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make()
    store.keep()
    before = store.rows.memory.copy()
    before[:] = store.rows.memory[:] = 0
    stuck = Stuck(store, monkeypatch)
    store.read(1, names(), PAGES, 0, 20)
    assert store.drop(1)
    assert not store.drop(1)
    assert store.poll() == []
    stuck.go.set()
    time.sleep(0.05)
    assert np.array_equal(store.rows.memory, before)


def test_a_slow_disk_fills_a_part_and_is_left_alone(
    make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(disk, "PATIENCE", 0.15)
    store = make()
    store.keep()
    read = store.folder.read
    monkeypatch.setattr(store.folder, "read", lambda *args: time.sleep(0.06) or read(*args))
    _, end = store.fill(PAGES)
    assert 0 < end < 20
    assert store.known(names()) == 0
    assert ["slower than" in line for line in lines(caplog)] == [True]


def fails(error: int) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        raise OSError(error, os.strerror(error))

    return call


def test_an_error_of_the_disk_switches_reading_off_for_a_while(
    make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = make()
    store.keep()
    with monkeypatch.context() as broken:
        broken.setattr(store.folder, "begin", fails(errno.EIO))
        assert store.fill(PAGES) == Filled(1, 0)
        assert store.known(names()) == 0
    store.troubles._until.clear()
    assert store.fill(PAGES) == Filled(1, 20)
    assert store.well
    assert len(lines(caplog)) == 2
    assert store.counts.failed == 1


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_is_full_or_read_only_is_still_read(
    make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: int
) -> None:
    store = make()
    store.keep(TOKENS[:8])
    monkeypatch.setattr(troubles, "PAUSE", 0.0)
    monkeypatch.setattr(disk, "LOOK", 0.01)
    with monkeypatch.context() as broken:
        broken.setattr(entry.os, "writev", fails(error))
        broken.setattr(os, "utime", fails(error))
        for _ in range(3):
            store.keep()
            time.sleep(0.03)
        assert not store.well
        assert store.fill(PAGES) == Filled(1, 8)
    assert [os.strerror(error) in line for line in lines(caplog)] == [True]
    store.keep()
    assert store.fill(PAGES) == Filled(1, 20)
    assert store.well
    assert "works again" in lines(caplog)[1]


def test_a_folder_that_vanishes_is_used_again_when_it_is_back(
    make: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(troubles, "PAUSE", 0.0)
    monkeypatch.setattr(disk, "LOOK", 0.02)
    store = make()
    store.keep()
    tmp_path.rename(moved := tmp_path.with_name("moved"))
    assert store.fill(PAGES) == Filled(1, 0)
    store.write(names(), PAGES, lambda a, b: True)
    time.sleep(0.05)
    assert ["No such file" in line for line in lines(caplog)] == [True]
    moved.rename(tmp_path)
    store.wait_until(lambda: store.well)
    assert store.fill(PAGES) == Filled(1, 20)
    (tmp_path / "brigade-kv").rename(tmp_path / "old")
    shutil.rmtree(tmp_path / "old")
    store.wait_until(lambda: store.known(names()) == 0 and store.well)
    store.keep()
    assert store.known(names()) == 5


def test_requests_beyond_the_queue_are_not_written(make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> None:
    store, go = make(), threading.Event()
    write = store.folder.write
    monkeypatch.setattr(store.folder, "write", lambda *args: go.wait(5) and write(*args))
    for _ in range(disk.MOST_WRITES + 2):
        store.write(names(), PAGES, lambda a, b: True)
    assert store.counts.dropped in (1, 2)
    go.set()
    store.wait_until(store._writes.empty)
    assert store.known(names()) == 5


def test_other_processes_entries_are_found_soon(make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "LOOK", 0.02)
    mine, other = make(), make(seed=2)
    mine.keep()
    other.wait_until(lambda: other.known(names()) == 5)
    assert other.fill(PAGES) == Filled(1, 20)
    assert other.tokens(PAGES, 0, 20) == mine.tokens(PAGES, 0, 20)
