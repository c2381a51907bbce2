"""A rank with a disk store: prompts are found after a restart, steps never wait, nothing is left behind."""

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from brigade.comm.kv import disk
from brigade.comm.kv.disk import DiskStore
from brigade.comm.kv.entry import Form
from brigade.comm.kv.folder import Folder
from brigade.comm.kv.rows import Rows
from brigade.core.pages import PagePool
from brigade.core.scheduler import Scheduler, StepPlan
from brigade.engine.client import Engine
from brigade.engine.config import DEMO_MODEL, EngineConfig
from brigade.engine.fingerprint import fingerprint, identity
from brigade.engine.fleet import Fleet
from brigade.engine.fleet_config import FleetConfig, UnitConfig
from brigade.engine.loop import Loop
from brigade.engine.messages import Abort, Add, Rouse, Stats, Step, StoreStats, Token
from brigade.engine.output import Unobserved
from brigade.engine.pulse import added
from brigade.engine.storing import Storing
from brigade.engine.worker import Wrote
from brigade.model.sampling import Choice
from brigade.spec.sampling import SamplingParams
from tests.engine.asking import ask
from tests.engine.test_loop import FakeWorker
from tests.engine.test_loop_losses import FakeGroup, FakeMembership

PAGE, N_PAGES, STEP, ROW = 4, 32, 8, 16
PROMPT = list(range(100, 130))


class WritingWorker(FakeWorker):
    """Its cache holds a row for each position, made from its token; it checks what its steps read."""

    def __init__(self) -> None:
        super().__init__({})
        self.rows = Rows(np.zeros(2 * N_PAGES * PAGE * ROW, np.uint8), 2, PAGE, ROW)
        self.prompts: dict[int, list[int]] = {}

    def add(self, rid: int, prompt: list[int], params: SamplingParams) -> None:
        super().add(rid, prompt, params)
        self.prompts[rid] = prompt

    def run(self, plan: StepPlan, n: int = 1, wrote: Wrote | None = None) -> dict[int, list[Choice]]:
        cache = self.rows.memory.reshape(2, N_PAGES, PAGE, ROW)
        for s in plan.slices:
            for at, token in enumerate(s.tokens, s.start):
                cache[:, s.pages[at // PAGE], at % PAGE] = max(token, 0) % 251
        for s in plan.slices:
            for at, token in enumerate(self.prompts[s.rid][: s.end]):
                assert (cache[:, s.pages[at // PAGE], at % PAGE] == token % 251).all(), f"position {at}"
        return super().run(plan)


class Rank:
    """One life of a rank over a folder."""

    def __init__(self, path: Path, depth: int = 1, membership: Any = None, share_answers: bool = True) -> None:
        self.worker = WritingWorker()
        self.scheduler = Scheduler(
            PagePool(N_PAGES, PAGE), max_step_tokens=16, max_running=4, share_answers=share_answers
        )
        self.store = DiskStore(Folder(str(path), 1 << 20, Form(2, STEP, ROW, b"i" * 16)), self.worker.rows)
        assert self.store.opened.wait(5)
        self.storing = Storing(self.store, self.scheduler, b"name")
        self.inbox: list[Any] = []
        self.sent: list[Any] = []
        channel: Any = SimpleNamespace(poll=self.poll, send=lambda *m: self.sent.extend(m))
        worker: Any = self.worker
        self.loop = Loop(worker, self.scheduler, channel, depth, membership, storing=self.storing)

    def poll(self, timeout: float | None) -> list[Any]:
        if timeout:
            time.sleep(timeout)
        out, self.inbox = self.inbox, []
        return out

    def serve(self, *messages: Any) -> "Rank":
        """Until nothing is left to do."""
        self.inbox += messages
        until = time.monotonic() + 10
        self.loop.turn()
        while self.scheduler.live or self.loop.pending or not self.loop.asleep:
            assert time.monotonic() < until
            self.loop.turn()
        while not self.store._writes.empty():
            time.sleep(0.001)
        time.sleep(0.05)
        assert self.scheduler.pool.n_free == N_PAGES
        assert not self.worker.n_new
        return self

    def first(self, rid: int) -> Token:
        return next(t for m in self.sent if isinstance(m, Step) for t in m.tokens if t.rid == rid)

    def end(self) -> None:
        self.store.close()


def add(rid: int, prompt: list[int] = PROMPT, salt: str = "", n: int = 3) -> Add:
    return Add(rid, prompt, SamplingParams(max_tokens=n, ignore_eos=True), salt)


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Any]:
    made: list[Rank] = []

    def start(**how: Any) -> Rank:
        made.append(Rank(tmp_path, **how))
        return made[-1]

    yield start
    for rank in made:
        rank.end()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_prompt_is_found_after_a_restart(ranks: Any, depth: int) -> None:
    before = ranks(depth=depth).serve(add(1))
    assert (before.first(1).n_cached, before.first(1).n_stored) == (0, 0)
    after = ranks(depth=depth).serve(add(2))
    assert (after.first(2).n_cached, after.first(2).n_stored) == (24, 24)
    assert next(s.start for plan in after.worker.ran for s in plan.slices) == 24
    stats = next(m for m in reversed(after.sent) if isinstance(m, Step)).stats.store
    assert stats is not None
    assert (stats.read_bytes > 0, stats.well, stats.failed) == (True, True, 0)


def test_what_memory_has_is_not_read(ranks: Any) -> None:
    ranks().serve(add(1))
    after = ranks().serve(add(1, PROMPT[:13]), add(2))
    assert (after.first(1).n_stored, after.first(2).n_stored) == (8, 12)
    after.serve(add(3))
    assert (after.first(3).n_cached, after.first(3).n_stored) == (28, 0)


def test_two_with_one_prompt_read_it_once(ranks: Any) -> None:
    ranks().serve(add(1))
    after = ranks().serve(add(1), add(2), add(3))
    assert sorted(after.first(rid).n_stored for rid in (1, 2, 3)) == [0, 0, 24]
    assert after.store.counts.read_bytes == 3 * after.store.folder.form.size


def test_tenants_do_not_share_and_answers_only_where_that_is_right(ranks: Any) -> None:
    ranks(share_answers=False).serve(add(1, salt="a", n=20))
    after = ranks(share_answers=False)
    after.serve(add(1, salt="b"), add(2, salt="a", prompt=[*PROMPT, *range(101, 121)]))
    assert (after.first(1).n_stored, after.first(2).n_stored) == (0, 24)
    ranks().serve(add(1, salt="c", n=20))
    again = ranks().serve(add(1, salt="c", prompt=[*PROMPT, *range(101, 121)]))
    assert again.first(1).n_stored == 48


def test_others_run_while_one_waits_for_the_disk_and_may_leave(ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks().serve(add(1))
    rank, go = ranks(), threading.Event()
    read = rank.store.folder.read
    monkeypatch.setattr(rank.store.folder, "read", lambda *args: go.wait(5) and read(*args))
    rank.inbox += [add(1), add(2, [7, 8, 9]), add(3)]
    for _ in range(8):
        rank.loop.turn()
    assert rank.first(2).token == 201
    assert [s.rid for plan in rank.worker.ran for s in plan.slices] == [2, 2, 2]
    assert rank.loop.stats().waiting == 2
    assert rank.loop.asleep, "a unit that only waits for a disk does not spin"
    rank.inbox += [Abort(1)]
    rank.loop.turn()
    assert 1 not in rank.scheduler.live
    go.set()
    rank.serve()
    assert rank.first(3).n_stored == 24


def test_a_stuck_disk_only_costs_its_deadline(ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "STALL", 0.05)
    ranks().serve(add(1))
    rank, go = ranks(), threading.Event()
    monkeypatch.setattr(rank.store.folder, "read", lambda *args: go.wait(5))
    rank.serve(add(1))
    go.set()
    assert (rank.first(1).n_cached, rank.first(1).n_stored) == (0, 0)
    assert rank.loop.stats().store.late == 1


def test_a_unit_that_sleeps_is_called_when_a_request_can_run(ranks: Any) -> None:
    ranks().serve(add(1))
    rank = ranks(membership=FakeMembership(FakeGroup(set()), set()))
    rank.inbox += [add(1)]
    until = time.monotonic() + 5
    while not any(isinstance(m, Rouse) for m in rank.sent):
        assert time.monotonic() < until
        rank.loop.turn()
    assert rank.loop.asleep
    rank.loop.asleep = False  # what Wake does
    rank.serve()
    assert rank.first(1).n_stored == 24


def test_statistics_of_ranks_that_share_a_folder_are_added() -> None:
    one = Stats(1, 2, 3, 4, 5, store=StoreStats(1, 2, 30, 4, 5, 6, 7, 8, True))
    two = Stats(9, 2, 3, 4, 5, store=StoreStats(1, 2, 31, 4, 5, 6, 7, 8, False))
    assert added([one, two]) == Stats(9, 4, 6, 8, 10, store=StoreStats(2, 4, 31, 8, 10, 12, 14, 16, False))
    assert added([one, Stats(0, 0, 0, 0, 0)]).store == one.store
    assert added([Stats(0, 0, 0, 0, 0)]).store is None


def test_another_checkpoint_or_another_way_to_compute_has_another_name(demo: Path) -> None:
    name = fingerprint(demo)
    assert fingerprint(DEMO_MODEL) == name
    data = bytearray((DEMO_MODEL / "model.safetensors").read_bytes())
    about = (DEMO_MODEL / "model.safetensors").stat()
    header = int.from_bytes(data[:8], "little")
    data[8 + header :: 64] = bytes(b ^ 1 for b in data[8 + header :: 64])
    (demo / "model.safetensors").unlink()
    (demo / "model.safetensors").write_bytes(data)
    os.utime(demo / "model.safetensors", ns=(about.st_atime_ns, about.st_mtime_ns))
    assert fingerprint(demo) != name, "other numbers, although size and time are the same"
    assert identity(name, wire="auto") != identity(name, wire="int8") != identity(fingerprint(demo), wire="int8")


class Watching(Unobserved):
    def __init__(self) -> None:
        self.stored: list[int] = []

    def first_token(self, seconds: float, n_prompt: int, n_cached: int, n_stored: int) -> None:
        self.stored.append(n_stored)


async def test_two_ranks_write_what_a_fleets_prefill_unit_finds_and_the_text_is_the_same(tmp_path: Path) -> None:
    prompt = "Once upon a time there was a fox who lived in the forest with a little bear. " * 6
    config = EngineConfig(kv_bytes=16 << 20, max_step_tokens=64, max_running=8)
    stored = replace(config, kv_disk=str(tmp_path), kv_disk_bytes=64 << 20)
    engine = await Engine.start(replace(stored, ranks=2))
    try:
        texts = [await ask(engine, prompt + end) for end in ("He", "She")]
        assert any("KV disk store" in note for note in engine.ready.notes)
    finally:
        await engine.close()
    observer = Watching()
    prefill = UnitConfig(name="reads", role="prefill", engine=stored)
    decode = UnitConfig(name="writes", role="decode", engine=config)
    fleet: Any = await Fleet.start(FleetConfig(units=(prefill, decode)), observer=observer)
    try:
        assert [await ask(fleet, prompt + end) for end in ("He", "She")] == texts
        assert observer.stored[0] >= 64
        assert fleet.stats().store.read_bytes > 0
    finally:
        await fleet.close()


def test_a_bound_that_holds_nothing_is_one_line(tmp_path: Path) -> None:
    model = SimpleNamespace(cache=SimpleNamespace(layers=torch.zeros(2, 3, 16, 8)), two_forms=False)
    worker: Any = SimpleNamespace(model=model, page=16, arithmetic="")
    scheduler: Any = None
    with pytest.raises(ValueError, match="kv_disk has 100 bytes, but 64 tokens of this model take 4172; give it more"):
        Storing.of(EngineConfig(kv_disk=str(tmp_path), kv_disk_bytes=100), b"", worker, scheduler)
