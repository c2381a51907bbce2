"""The unit over made-up hosts: when it forms, what it stops, whom it replaces, and what it says about it."""

import asyncio
from collections.abc import AsyncIterator, Iterable

import pytest
import pytest_asyncio

from brigade.engine import unit as module
from brigade.engine.config import EngineConfig
from brigade.engine.local_host import Ended
from brigade.engine.messages import Failed, Form, FromWorker, Loaded, Lost, Pong, Ready, Start, Stats, Step, ToWorker
from brigade.engine.output import LoadError
from brigade.engine.unit import Broken, Unit, UnitLost, Whole
from tests.engine.asking import until

STATS = Stats(0, 0, 0, 0, 0)


class FakeHost:
    """Does nothing by itself; the test says what its ranks say."""

    def __init__(self, ranks: range, address: str) -> None:
        self.ranks, self.address = ranks, address
        self.heard: asyncio.Queue[tuple[int, FromWorker | Ended]] = asyncio.Queue()
        self.sent: dict[int, list[ToWorker]] = {rank: [] for rank in ranks}
        self.stopped: list[tuple[int, list[int]]] = []
        self.killed: list[int] = []
        self.refusals = 0
        self.ended = False

    async def start(self, start: Start) -> None:
        if self.refusals:
            self.refusals -= 1
            raise LoadError("no process can be started")
        self.sent[start.rank] = [start]

    def send(self, rank: int, *messages: ToWorker) -> None:
        self.sent[rank] += messages

    async def receive(self) -> tuple[int, FromWorker | Ended]:
        return await self.heard.get()

    def stop(self, generation: int, culprits: Iterable[int] = ()) -> None:
        self.stopped.append((generation, list(culprits)))

    def kill(self, rank: int) -> None:
        self.killed.append(rank)
        self.heard.put_nowait((rank, Ended("killed by SIGKILL")))

    async def end(self) -> dict[int, str]:
        self.ended = True
        return dict.fromkeys(self.ranks, "exit code 0")


class Rig:
    """A unit of four ranks on two hosts, which has formed."""

    def __init__(self) -> None:
        self.hosts = [FakeHost(range(2), "10.0.0.1"), FakeHost(range(2, 4), "10.0.0.2")]
        self.unit = Unit(EngineConfig(ranks=4), list(self.hosts))
        self.first = asyncio.ensure_future(self.unit._first(lambda _: None))

    def says(self, rank: int, *messages: FromWorker | Ended) -> None:
        for message in messages:
            self.hosts[rank // 2].heard.put_nowait((rank, message))

    def sent(self, rank: int) -> list[ToWorker]:
        return self.hosts[rank // 2].sent[rank]

    async def heard(self) -> object:
        return await asyncio.wait_for(self.unit.receive(), 2)

    async def form(self, generation: int, ranks: Iterable[int] = range(4)) -> Form:
        """Let all ranks come to a generation that is due, and say so."""
        assert await until(lambda: all(isinstance(self.sent(rank)[-1], Form) for rank in range(4)), 2)
        [form] = {str(self.sent(rank)[-1]) for rank in range(4)}
        for rank in ranks:
            self.says(rank, Ready(10 + rank, 16, 1000 - rank, [f"rank {rank}"], generation))
        last = self.sent(0)[-1]
        assert isinstance(last, Form)
        assert str(last) == form
        assert last.generation == generation
        return last


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    assert await until(lambda: all(rig.sent(rank) for rank in range(4)), 2)
    for rank in range(4):
        rig.says(rank, Loaded(7000 + rank))
    await rig.form(1)
    await asyncio.wait_for(rig.first, 2)
    yield rig
    await rig.unit.end()
    assert all(host.ended for host in rig.hosts)


async def test_all_ranks_learn_where_the_others_listen_and_the_unit_offers_all_pages() -> None:
    rig = Rig()
    assert await until(lambda: all(rig.sent(rank) for rank in range(4)), 2)
    for rank in range(3):
        rig.says(rank, Loaded(7000 + rank))
    await asyncio.sleep(0.05)
    assert [type(m) for m in rig.sent(0)] == [Start], "nobody is called before all have loaded"
    rig.says(3, Loaded(7003))
    form = await rig.form(1)
    assert form.addresses == ["10.0.0.1:7000", "10.0.0.1:7001", "10.0.0.2:7002", "10.0.0.2:7003"]
    ready = await asyncio.wait_for(rig.first, 2)
    assert (ready.n_pages, ready.max_context) == (10 + 11 + 12 + 13, 997)
    await rig.unit.end()


async def test_a_dead_process_stops_the_generation_everywhere_and_is_replaced(rig: Rig) -> None:
    rig.says(1, Ended("killed by SIGKILL"))
    assert await rig.heard() == Broken(1, "rank 1: its process ended (killed by SIGKILL)")
    assert [host.stopped for host in rig.hosts] == [[(1, [1])]] * 2
    assert await until(lambda: [type(m) for m in rig.sent(1)] == [Start], 2)
    for rank in (0, 2, 3):
        rig.says(rank, Lost([1], "rank 1: lost", 1))  # that they were stopped blames nobody anew
    rig.says(1, Loaded(8001))
    assert (await rig.form(2)).addresses[1] == "10.0.0.1:8001"
    assert isinstance(await rig.heard(), Whole)
    assert [host.killed for host in rig.hosts] == [[], []]


async def test_a_rank_that_others_wait_for_in_vain_is_killed_and_replaced(rig: Rig) -> None:
    rig.says(0, Lost([2], "rank 2: did not arrive within 5 s", 1))
    assert await rig.heard() == Broken(2, "rank 2: did not arrive within 5 s", unnoticed=5.0)
    assert rig.hosts[0].stopped == [(1, [2])]
    assert rig.hosts[1].killed == [2]
    rig.says(3, Lost([2], "rank 2: did not arrive within 5 s", 1))
    assert await until(lambda: [type(m) for m in rig.sent(2)] == [Start], 2)
    rig.says(2, Loaded(8002))
    await rig.form(2)
    rig.says(
        1, Lost([2], "rank 2: did not arrive within 5 s", 1)
    )  # of an older generation: the new one is not to blame
    assert isinstance(await rig.heard(), Whole)
    assert rig.hosts[1].killed == [2]


async def test_a_loss_while_the_unit_forms_starts_another_generation(rig: Rig) -> None:
    rig.says(1, Ended("exit code 1"))
    assert await until(lambda: [type(m) for m in rig.sent(1)] == [Start], 2)
    rig.says(1, Loaded())
    await rig.form(2, [0, 1])
    rig.says(3, Ended("exit code 1"))
    assert await until(lambda: [type(m) for m in rig.sent(3)] == [Start], 2)
    assert rig.hosts[0].stopped == [(1, [1]), (2, [3])]
    rig.says(2, Ready(12, 16, 1000, [], 2))  # too late: that generation was stopped
    rig.says(3, Loaded())
    await rig.form(3)
    assert [type(await rig.heard()) for _ in range(3)] == [Broken, Broken, Whole]


async def test_pauses_grow_while_a_replacement_fails_and_start_anew_when_the_unit_has_served(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(module, "pause", lambda n_failed: asked.append(n_failed) or 0.0)
    rig.hosts[0].refusals = 2
    rig.says(1, Ended("exit code 1"))
    assert await until(lambda: [type(m) for m in rig.sent(1)] == [Start] and len(asked) == 3, 2)
    rig.says(1, Failed("model.safetensors: cut short"), Ended("exit code 2"))
    assert await until(lambda: len(asked) == 4, 2)
    told = [await rig.heard() for _ in range(4)]
    assert [t.why for t in told if isinstance(t, Broken)] == [
        "rank 1: its process ended (exit code 1)",
        *["rank 1: no process can be started"] * 2,
        "rank 1: model.safetensors: cut short",
    ]
    await asyncio.sleep(0.02)
    rig.says(1, Loaded())
    await rig.form(2)
    assert isinstance(await rig.heard(), Whole)
    rig.says(0, Step([], STATS))
    assert isinstance(await rig.heard(), tuple)
    rig.says(1, Ended("exit code 1"))
    assert await until(lambda: len(asked) == 5, 2)
    assert asked == [0, 1, 2, 3, 0]


def test_pauses_are_not_longer_than_the_longest() -> None:
    assert [module.pause(n) for n in (0, 1, 2, 3, 50)] == [0, 0.5, 1.5, 3.5, module.LONGEST_PAUSE]


async def test_when_nobody_is_left_the_unit_is_lost(rig: Rig) -> None:
    for rank in range(4):
        rig.says(rank, Ended("killed by SIGKILL"))
    assert [type(await rig.heard()) for _ in range(3)] == [Broken] * 3
    with pytest.raises(UnitLost, match="rank 3"):
        await rig.heard()


async def test_messages_pass_through(rig: Rig) -> None:
    rig.says(2, Pong(3, STATS))
    assert await rig.heard() == (2, Pong(3, STATS))


async def test_a_rank_that_is_given_up_is_named_with_the_reason(rig: Rig) -> None:
    rig.unit.kill(3, "nothing came from it for 60 s")
    assert await rig.heard() == Broken(3, "rank 3: nothing came from it for 60 s")


async def test_a_loss_while_the_unit_starts_is_the_end_of_it() -> None:
    rig = Rig()
    assert await until(lambda: all(rig.sent(rank) for rank in range(4)), 2)
    rig.says(2, Failed("config.json: no"), Ended("exit code 2"))
    with pytest.raises(UnitLost, match=r"rank 2: config\.json: no"):
        await asyncio.wait_for(rig.first, 2)
    await rig.unit.end()
