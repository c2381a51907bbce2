"""The reference deployment's 22 hosts and 176 ranks as the gateway sees them, with supervisors that the test plays.

They start together, a lost host costs the others little, and all of it ends. Loopback has an address for each host.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from brigade.comm.link import Link, LinkLost, call
from brigade.engine.config import DEMO_MODEL, EngineConfig, HostsConfig
from brigade.engine.fleet import Fleet
from brigade.engine.fleet_config import FleetConfig, UnitConfig
from brigade.engine.host_messages import (
    Begin,
    EndRanks,
    FromSupervisor,
    Goodbye,
    Heard,
    Join,
    Joined,
    RanksEnded,
    Refusal,
    StartRank,
    Stop,
    Terms,
    ToRank,
    ToSupervisor,
)
from brigade.engine.messages import Form, Loaded, Ping, Pong, Ready, Stats
from brigade.engine.terms import model_terms, versions
from brigade.spec.layout import Host, Layout
from tests.engine.asking import until
from tests.engine.hosting import SECRET, free_port

PREFILL = Layout(tuple(Host(f"127.0.2.{i}", 8) for i in range(4)))
DECODE = Layout(tuple(Host(f"127.0.3.{i}", 8) for i in range(18)))
GATEWAY = "127.0.0.1"


class Supervisor:
    """Plays a host: its ranks load at once and are ready whenever they are called together."""

    def __init__(self, port: int, address: str, terms: dict[str, str]) -> None:
        self._port, self.address, self._terms = port, address, terms
        self.generations: list[int] = []
        self.stopped: list[list[int]] = []
        self.goodbye = ""
        self._link: Link[ToSupervisor]
        self._task = asyncio.create_task(self._run())

    async def lose(self) -> None:
        """The link is lost; the host calls again after a moment."""
        await self._link.close()
        await self._task
        self._task = asyncio.create_task(self._run())

    async def ended(self) -> None:
        await asyncio.wait_for(self._task, 10)

    async def _run(self) -> None:
        while not await self._joined():
            await asyncio.sleep(0.05)
        with contextlib.suppress(LinkLost):
            while not self.goodbye:
                self._link.send(*self._answers(await self._link.receive()))
        await self._link.close()

    async def _joined(self) -> bool:
        self._link = await call((GATEWAY, self._port), SECRET, ToSupervisor, silence=5, deadline=5)
        assert isinstance(await self._link.receive(), Terms)
        self._link.send(Join(self.address, self._terms, time.time()))
        answer = await self._link.receive()
        assert isinstance(answer, Joined) or (isinstance(answer, Refusal) and answer.again), answer
        return isinstance(answer, Joined)

    def _answers(self, order: ToSupervisor) -> list[FromSupervisor]:
        match order:
            case StartRank(unit, start):
                return [Heard(unit, start.rank, Loaded(7))]
            case ToRank(unit, rank, messages):
                return [Heard(unit, rank, said) for m in messages if (said := self._said(m))]
            case Stop(_, _, culprits):
                self.stopped.append(culprits)
            case EndRanks(unit):
                return [RanksEnded(unit, {})]
            case Goodbye(text):
                self.goodbye = text
            case Begin():
                pass
        return []

    def _said(self, message: object) -> Ready | Pong | None:
        match message:
            case Form(generation):
                self.generations.append(generation)
                return Ready(100, 16, 1024, [], generation)
            case Ping(seq):
                return Pong(seq, Stats(0, 0, 0, 0, 0))
        return None


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The demo model with 256 experts: nobody reads its weights."""
    for file in DEMO_MODEL.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_routed_experts": 256}))
    return tmp_path


@pytest_asyncio.fixture
async def started(model: Path) -> AsyncIterator[tuple[Fleet, dict[str, Supervisor]]]:
    port = free_port()
    hosts = HostsConfig(layouts=(PREFILL, DECODE), head=GATEWAY, secret=SECRET, port=port, wait=20)
    common: dict[str, Any] = {"model": str(model), "redundant_experts": 32}
    units = tuple(
        UnitConfig(name=f"{role}-0", role=role, engine=EngineConfig(**common, ranks=layout.n_ranks))
        for role, layout in (("prefill", PREFILL), ("decode", DECODE))
    )
    starting = asyncio.create_task(Fleet.start(FleetConfig(units=units), hosts=hosts))
    await asyncio.sleep(0.3)
    terms = {**versions(), **model_terms(model)}
    played = {address: Supervisor(port, address, terms) for address in hosts.others}
    fleet = await asyncio.wait_for(starting, 20)
    yield fleet, played
    await fleet.close()
    await asyncio.gather(*(host.ended() for host in played.values()))
    assert {host.goodbye for host in played.values()} == {"the head was ended"}


async def test_22_hosts_start_together_and_a_lost_one_breaks_its_unit_alone(
    started: tuple[Fleet, dict[str, Supervisor]], caplog: pytest.LogCaptureFixture
) -> None:
    fleet, played = started
    assert len(played) == 22
    assert fleet.health().ready
    assert {tuple(host.generations) for host in played.values()} == {(1,) * 8}, "each rank of each unit has met once"
    lost, began = played["127.0.3.7"], time.monotonic()
    await lost.lose()
    assert await until(lambda: "decode-0: all ranks are there again" in caplog.text, 10)
    print(f"one of 22 hosts was lost and back after {time.monotonic() - began:.2f} s")
    assert "decode-0: lost and being replaced: rank 56: " in caplog.text
    assert fleet.health().ready
    decode = [host for address, host in played.items() if address.startswith("127.0.3.") and host is not lost]
    assert {tuple(host.generations) for host in decode} == {(1,) * 8 + (2,) * 8}
    assert {tuple(map(tuple, host.stopped)) for host in decode} == {((56,),)}, "nobody waits for the lost one"
    prefill = [host for address, host in played.items() if address.startswith("127.0.2.")]
    assert {(tuple(host.generations), len(host.stopped)) for host in prefill} == {((1,) * 8, 0)}, "another unit"
