"""A fleet whose units share hosts and span them says what one rank says, also when a host is lost and comes back.

The gateway is 127.0.0.1 and has no ranks. 127.0.0.2 has the prefill rank and a decode rank, 127.0.0.3 another decode
rank of the same unit: prompts go through memory to one and over TCP to the other.
"""

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from brigade.comm.link import Link
from brigade.engine.config import EngineConfig, HostsConfig, KvConfig
from brigade.engine.fleet import Fleet
from brigade.engine.fleet_config import FleetConfig, UnitConfig
from brigade.engine.host_messages import Goodbye
from brigade.engine.kv_host import KvHost, kv_secret
from brigade.engine.output import LoadError
from brigade.engine.supervisor import supervise
from brigade.spec.layout import Host, Layout
from tests.engine.asking import until
from tests.engine.conftest import workers
from tests.engine.hosting import SECRET, free_port, joining
from tests.scenarios.fleets import all_pages_are_back, ask_all, said
from tests.scenarios.one_rank import GREEDY, LONG, PROMPTS, says

PREFILL = Layout((Host("127.0.0.2", 1),))
DECODE = Layout((Host("127.0.0.2", 1), Host("127.0.0.3", 1)))


def config() -> FleetConfig:
    one = EngineConfig(max_step_tokens=64, max_running=16, rank_deadline=10, threads=1, kv_bytes=1 << 22)
    two = EngineConfig(max_step_tokens=64, max_running=16, rank_deadline=10, threads=1, ranks=2, kv_bytes=1 << 22)
    prefill = UnitConfig(name="prefill-0", role="prefill", engine=one)
    return FleetConfig(units=(prefill, UnitConfig(name="decode-0", role="decode", engine=two)))


class Hosted:
    """A fleet, and the supervisors of its hosts, in this process."""

    def __init__(
        self, fleet: Fleet, port: int, joined: dict[int, "asyncio.Task[Goodbye]"], sent: dict[str, bytes]
    ) -> None:
        """`sent`: between gateway and hosts, one message of each kind."""
        self.fleet, self._port, self.joined, self.sent = fleet, port, joined, sent

    async def lose(self, host: int) -> None:
        self.joined[host].cancel()
        await asyncio.wait([self.joined[host]])

    def join(self, host: int) -> None:
        self.joined[host] = asyncio.create_task(supervise(joining(self._port, host)))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hosted() -> AsyncIterator[Hosted]:
    others, port = workers(), free_port()
    sent: dict[str, bytes] = {}
    send = Link.send

    def record(link: Link[Any], *messages: Any) -> None:
        sent.update({type(m).__name__: msgspec.msgpack.encode(m) for m in messages})
        send(link, *messages)

    patched = pytest.MonkeyPatch()
    patched.setattr(Link, "send", record)
    joined = {h: asyncio.create_task(supervise(joining(port, h))) for h in (1, 2)}
    hosts = HostsConfig(layouts=(PREFILL, DECODE), head="127.0.0.1", secret=SECRET, port=port, wait=30)
    fleet = await Fleet.start(config(), hosts=hosts)
    kept = Hosted(fleet, port, joined, sent)
    try:
        yield kept
    finally:
        patched.undo()
        await fleet.close()
    ends = await asyncio.wait_for(asyncio.gather(*kept.joined.values()), 20)
    assert [type(e) for e in ends] == [Goodbye, Goodbye], "hosts end with the gateway"
    assert workers() <= others


@pytest.mark.asyncio(loop_scope="module")
async def test_text_is_that_of_one_rank(hosted: Hosted) -> None:
    fleet = hosted.fleet
    assert await ask_all(fleet, PROMPTS, GREEDY) == [says(p, GREEDY) for p in PROMPTS]
    assert (fleet.transfers["fetched"], fleet.transfers["computed"]) == (len(PROMPTS), 0)
    told = {unit.unit: unit.loads.n_ranks for unit in await fleet.expert_loads() if unit.loads}
    assert told == {"prefill-0": 1, "decode-0": 2}
    assert await all_pages_are_back(fleet)


@pytest.mark.asyncio(loop_scope="module")
async def test_no_secret_is_sent(hosted: Hosted) -> None:
    assert {"Begin", "StartRank", "ToRank", "Heard", "Join"} <= set(hosted.sent)
    assert b"n_here" in hosted.sent["StartRank"]
    for secret in (SECRET, kv_secret(SECRET)):
        for shape in (secret, base64.b64encode(secret), secret.hex().encode()):
            assert not any(shape in message for message in hosted.sent.values())


@pytest.mark.asyncio(loop_scope="module")
async def test_requests_go_on_when_a_host_was_lost_and_is_there_again(
    hosted: Hosted, caplog: pytest.LogCaptureFixture
) -> None:
    """It has ranks of both units: no prompt can be computed, and none of the other rank's steps be made, until then."""
    prompts, fleet = PROMPTS[:6], hosted.fleet
    answers = [asyncio.create_task(said(await fleet.submit(p, LONG))) for p in prompts]
    assert await until(lambda: fleet.states()["decoding"] >= 4, 10)
    await hosted.lose(1)
    assert await until(lambda: not fleet.health().ready, 3)
    hosted.join(1)
    assert await asyncio.wait_for(asyncio.gather(*answers), 30) == [says(p) for p in prompts]
    assert await until(lambda: fleet.health().ready, 20)
    assert "host 127.0.0.2 (prefill-0: rank 0; decode-0: rank 0) is gone" in caplog.text
    assert "decode-0: lost and being replaced: rank 0: " in caplog.text
    assert await all_pages_are_back(fleet)


async def test_hosts_that_do_not_join_are_named_with_their_ranks_of_every_unit() -> None:
    hosts = HostsConfig(layouts=(PREFILL, DECODE), head="127.0.0.1", secret=SECRET, port=free_port(), wait=0.2)
    with pytest.raises(LoadError) as e:
        await Fleet.start(config(), hosts=hosts)
    assert "host 127.0.0.2 (prefill-0: rank 0; decode-0: rank 0), host 127.0.0.3 (decode-0: rank 1)" in str(e.value)


def test_ranks_of_one_host_share_memory_and_the_rest_knows_a_secret_that_is_not_the_hosts() -> None:
    of = {}
    for address in ("127.0.0.2", "127.0.0.3"):
        host = KvHost.create(address, [PREFILL, DECODE], SECRET)
        with contextlib.closing(host):
            of[address] = [host.of(unit, KvConfig()) for unit in (0, 1)]
    assert [[f >= 0 for f in kv.files] for kv in of["127.0.0.2"]] == [[True, True, False]] * 2
    assert [f >= 0 for f in of["127.0.0.3"][1].files] == [False, False, True]
    assert [kv.first for kv in of["127.0.0.2"]] == [0, 1]
    assert [kv.address for kv in of["127.0.0.2"]] == ["127.0.0.2"] * 2
    secrets = {kv.secret for kvs in of.values() for kv in kvs}
    assert secrets == {kv_secret(SECRET)}
    assert SECRET not in secrets


def test_ranks_of_all_units_of_a_host_share_it_and_a_link_over_tcp_alone_shares_no_memory() -> None:
    two = Layout((Host("10.0.0.1", 2),))
    with contextlib.closing(KvHost.create("10.0.0.1", [two, two])) as host:
        kv = host.of(1, KvConfig())
        assert (kv.address, kv.first, len(kv.files), kv.n_here) == ("10.0.0.1", 2, 4, 4)
        assert host.of(1, KvConfig(link="tcp")).files == ()
