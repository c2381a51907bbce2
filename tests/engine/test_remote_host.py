"""Another host as the head sees it, with a supervisor that the test plays: orders, news, and what a loss means."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from brigade.comm.link import Link, LinkLost, call
from brigade.engine import remote_host
from brigade.engine.config import EngineConfig, HostsConfig
from brigade.engine.host_messages import (
    Begin,
    EndRanks,
    Heard,
    Join,
    Joined,
    KillRank,
    RankEnded,
    RanksEnded,
    Refusal,
    StartRank,
    Stop,
    Terms,
    ToRank,
    ToSupervisor,
)
from brigade.engine.local_host import Ended
from brigade.engine.messages import Loaded, Ping, Start
from brigade.engine.output import LoadError
from brigade.engine.rendezvous import Rendezvous
from brigade.engine.supervisor import HeadMissing, supervise
from tests.engine.asking import until
from tests.engine.hosting import SECRET, joining, layout_of

CONFIG = EngineConfig(ranks=3)


@pytest_asyncio.fixture
async def head() -> AsyncIterator[Rendezvous]:
    hosts = HostsConfig(layouts=(layout_of(1, 2),), secret=SECRET, port=0, wait=0.5)
    rendezvous = await Rendezvous.open([CONFIG], hosts)
    yield rendezvous
    await rendezvous.close()


async def reach(head: Rendezvous) -> Link[Any]:
    return await call(("127.0.0.1", head.port), SECRET, ToSupervisor, silence=2, deadline=2)


async def joined(head: Rendezvous) -> Link[Any]:
    link = await reach(head)
    assert isinstance(await link.receive(), Terms)
    link.send(Join("127.0.0.2", head._terms, time.time()))
    assert await link.receive() == Joined()
    assert await until(head.guests[0].joined.is_set, 1)
    return link


async def next_of(waiting: Any) -> Any:
    return await asyncio.wait_for(waiting, 4)


async def test_orders_arrive_in_order_and_news_come_back(head: Rendezvous) -> None:
    link, host = await joined(head), head.units[0]["127.0.0.2"]
    await head.wait()
    assert (host.ranks, host.address, host.name) == (range(1, 3), "127.0.0.2", "host 127.0.0.2 (ranks 1 to 2)")
    await host.start(Start(CONFIG, 1))
    await host.start(Start(CONFIG, 2))
    host.send(1, Ping(1), Ping(2))
    host.stop(4, [0])
    host.kill(2)
    told = [await next_of(link.receive()) for _ in range(6)]
    assert told == [
        Begin(0, CONFIG, [[("127.0.0.1", 1), ("127.0.0.2", 2)]]),
        StartRank(0, Start(CONFIG, 1)),
        StartRank(0, Start(CONFIG, 2)),
        ToRank(0, 1, [Ping(1), Ping(2)]),
        Stop(0, 4, [0]),
        KillRank(0, 2),
    ]
    link.send(Heard(0, 1, Loaded(77)), RankEnded(0, 2, "killed by SIGKILL"))
    assert await next_of(host.receive()) == (1, Loaded(77))
    assert await next_of(host.receive()) == (2, Ended("killed by SIGKILL"))
    with pytest.raises(ValueError, match="rank 1 has a process"):
        await host.start(Start(CONFIG, 1))
    await link.close()


async def test_a_lost_link_ends_all_ranks_behind_it_and_what_was_stopped_meanwhile_is_told_later(
    head: Rendezvous,
) -> None:
    link, host = await joined(head), head.units[0]["127.0.0.2"]
    for rank in host.ranks:
        await host.start(Start(CONFIG, rank))
    await link.close()
    for rank in host.ranks:
        who, ended = await next_of(host.receive())
        assert who == rank
        assert ended.how.startswith("its host 127.0.0.2 is gone: 127.0.0.1:")
    host.stop(9, [1, 2])
    host.send(1, Ping(1))
    began = time.monotonic()
    with pytest.raises(LoadError, match=r"host 127.0.0.2 \(ranks 1 to 2\) has been gone for 0.5 s"):
        await host.start(Start(CONFIG, 1))
    assert time.monotonic() - began < 1.5
    starting = asyncio.ensure_future(host.start(Start(CONFIG, 1)))
    link = await joined(head)
    await next_of(starting)
    assert [type(await next_of(link.receive())) for _ in range(3)] == [Begin, Stop, StartRank]
    await link.close()


async def test_the_end_waits_for_the_supervisor_and_not_for_ever(
    head: Rendezvous, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, host = await joined(head), head.units[0]["127.0.0.2"]
    assert await host.end() == {}, "nothing was begun"
    await host.start(Start(CONFIG, 1))
    ending = asyncio.ensure_future(host.end())
    while not isinstance(await next_of(link.receive()), EndRanks):
        pass
    link.send(RanksEnded(0, {1: "exit code 0"}))
    assert await next_of(ending) == {1: "exit code 0"}
    monkeypatch.setattr(remote_host, "_END_S", 0.2)
    await host.start(Start(CONFIG, 1))
    assert await next_of(host.end()) == {1: "its host 127.0.0.2 does not say how"}
    assert await until(lambda: not host.joined.is_set(), 2), "it must join again"
    await link.close()


async def test_who_knows_the_secret_and_talks_nonsense_loses_its_own_link_alone(head: Rendezvous) -> None:
    good = await joined(head)
    for nonsense in (RankEnded(0, 1, "x"), RanksEnded(0, {}), Heard(0, 1, Loaded(1))):
        bad = await reach(head)
        assert isinstance(await bad.receive(), Terms)
        bad.send(nonsense)
        with pytest.raises(LinkLost):
            await next_of(bad.receive())
        await bad.close()
    assert head.guests[0].joined.is_set()
    second = await reach(head)
    second.send(Join("127.0.0.2", head._terms, time.time()))
    assert isinstance(await next_of(second.receive()), Terms)
    assert await next_of(second.receive()) == Refusal("host 127.0.0.2 has joined already", again=True)
    await second.close()
    good.send(RanksEnded(0, {}))
    with pytest.raises(LinkLost):
        await next_of(good.receive())
    assert not head.guests[0].joined.is_set()


async def test_a_second_supervisor_says_once_what_it_waits_for_and_gives_up(
    head: Rendezvous, caplog: pytest.LogCaptureFixture
) -> None:
    first = await joined(head)
    with pytest.raises(HeadMissing, match=r"host 127.0.0.2 has joined already, and did not go for 1.2 s; end it, or"):
        await next_of(supervise(joining(head.port, 1, wait=1.2)))
    waits, turned = "is another `brigade join` for this host running?", "called as host 127.0.0.2, which has joined"
    assert (caplog.text.count(waits), caplog.text.count(turned)) == (1, 1)
    assert "the head is gone" not in caplog.text
    assert head.guests[0].joined.is_set()
    await first.close()


async def test_a_missing_host_is_named_with_its_ranks(head: Rendezvous) -> None:
    with pytest.raises(LoadError, match=r"did not join within 0.5 s: host 127.0.0.2 \(ranks 1 to 2\); run `brigade"):
        await head.wait()
