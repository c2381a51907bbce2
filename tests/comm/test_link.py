"""The link between hosts: whoever does not know the secret costs the others nothing; a silent host is lost in time."""

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brigade.comm import link as link_module
from brigade.comm.channel import frame
from brigade.comm.handshake import Differs, Hello, Refused, calling
from brigade.comm.link import Door, Link, LinkLost, call

SECRET = b"a secret of hosts"


class Say(msgspec.Struct, frozen=True, tag=True):
    text: str


class Shout(msgspec.Struct, frozen=True, tag=True):
    text: str


KIND = Say | Shout


@asynccontextmanager
async def a_door(silence: float = 5, secret: bytes = SECRET) -> AsyncIterator[tuple[Door[Any], list[Link[Any]]]]:
    links: list[Link[Any]] = []

    async def keep(link: Link[Any]) -> None:
        links.append(link)

    door: Door[Any] = Door(secret, KIND, silence, keep)
    await door.open(("127.0.0.1", 0))
    try:
        yield door, links
    finally:
        await door.close()
        for link in links:
            await link.close()


async def reach(door: Door[Any], silence: float = 5, secret: bytes = SECRET) -> Link[Any]:
    return await call(door.address, secret, KIND, silence=silence, deadline=3)


async def within(seconds: float, true: Callable[[], object]) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.01)


async def test_messages_go_both_ways_in_order() -> None:
    async with a_door() as (door, links):
        ours = await reach(door)
        ours.send(Say("a"), Shout("b"))
        await within(1, lambda: links)
        assert [await links[0].receive(), await links[0].receive()] == [Say("a"), Shout("b")]
        links[0].send(Say("x" * 3_000_000))
        assert await ours.receive() == Say("x" * 3_000_000)
        await ours.close()


async def test_what_was_queued_arrives_before_the_end_does() -> None:
    async with a_door() as (door, links):
        ours = await reach(door)
        await within(1, lambda: links)
        ours.send(*(Say(str(i)) for i in range(1000)))
        await ours.close()
        assert [await links[0].receive() for _ in range(1000)][-1] == Say("999")
        for _ in range(2):
            with pytest.raises(LinkLost, match=r"127.0.0.1:\d+: it closed"):
                await links[0].receive()
        links[0].send(Say("into the void"))


async def test_another_secret_is_refused_and_said_on_both_sides(caplog: pytest.LogCaptureFixture) -> None:
    async with a_door() as (door, links):
        for _ in range(3):
            with pytest.raises(Refused, match="another secret"):
                await reach(door, secret=b"another secret...")
        await asyncio.sleep(0.05)
        assert not links
        assert caplog.text.count("turned away") == 1, "a stranger cannot fill the log"
    with pytest.raises(ValueError, match="at least 16 bytes, not 5"):
        Door(b"short", KIND, 1, None)  # type: ignore[arg-type]


async def test_another_version_is_refused_with_both_values_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []

    async def nobody(link: Link[Any]) -> None:
        raise AssertionError("no link must come of this")

    door: Door[Any] = Door(SECRET, KIND, 5, nobody, lambda peer, e: heard.append(str(e)))
    await door.open(("127.0.0.1", 0))
    old = Hello(0, 0, 0, link_module._PURPOSE, os.urandom(32), version=0)
    reader, writer = await asyncio.open_connection(*door.address)
    with pytest.raises(Differs, match="protocol version: 0 here, 1 there"):
        await link_module._shake(calling(old, SECRET), reader, writer)
    await within(1, lambda: heard)
    assert heard == ["protocol version: 1 here, 0 there"]
    writer.close()
    await door.close()


async def test_a_handshake_of_ranks_does_not_pass_for_one_of_hosts() -> None:
    async with a_door() as (door, links):
        reader, writer = await asyncio.open_connection(*door.address)
        with pytest.raises(Differs, match="layout: "):
            await link_module._shake(calling(Hello(0, 2, 1, b"l" * 32, os.urandom(32)), SECRET), reader, writer)
        assert not links
        writer.close()


async def test_64_idle_connections_and_babble_keep_nobody_out() -> None:
    async with a_door() as (door, links):
        silent = [socket.create_connection(door.address) for _ in range(64)]

        async def babble() -> None:
            while True:
                _, writer = await asyncio.open_connection(*door.address)
                writer.write(os.urandom(1 + os.urandom(1)[0] * 4))
                writer.close()
                await asyncio.sleep(0.005)

        noise = asyncio.ensure_future(babble())
        await asyncio.sleep(0.1)
        begun = time.monotonic()
        ours = [await reach(door) for _ in range(5)]
        assert time.monotonic() - begun < 1
        await within(1, lambda: len(links) == 5)
        noise.cancel()
        for thing in silent:
            thing.settimeout(link_module.HANDSHAKE_S + 1)
            assert await asyncio.to_thread(thing.recv, 1) == b"", "who says nothing is let go"
            thing.close()
        for link in ours:
            await link.close()


async def test_a_handshake_cut_or_flipped_anywhere_gets_no_welcome() -> None:
    async with a_door() as (door, links):
        hello = Hello(0, 0, 0, link_module._PURPOSE, os.urandom(32)).pack()
        for i in range(0, len(hello), 7):
            for data in (hello[:i], hello[:i] + bytes([hello[i] ^ 1]) + hello[i + 1 :] + os.urandom(32)):
                reader, writer = await asyncio.open_connection(*door.address)
                writer.write(data)
                writer.write_eof()
                assert len(await asyncio.wait_for(reader.read(), 3)) in (0, len(hello) + 32)
                writer.close()
        assert not links
        await (await reach(door)).close()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=64), min_size=1, max_size=4))
def test_random_bytes_after_the_handshake_lose_that_link_alone(pieces: list[bytes]) -> None:
    async def run() -> None:
        async with a_door() as (door, links):
            good, bad = await reach(door), await reach(door)
            await within(1, lambda: len(links) == 2)
            bad._writer.write(b"\xff".join(pieces) + b"\xff" * 4)
            bad._writer.write_eof()
            with pytest.raises(LinkLost):
                await asyncio.wait_for(links[1].receive(), 2)
            good.send(Say("still here"))
            assert await asyncio.wait_for(links[0].receive(), 1) == Say("still here")
            await good.close()
            await bad.close()

    asyncio.run(run())


async def test_a_side_that_falls_silent_is_lost_after_the_silence_and_says_how_long() -> None:
    async with a_door(silence=0.9) as (door, links):
        reader, writer = await asyncio.open_connection(*door.address)
        await link_module._shake(calling(link_module._hello(), SECRET), reader, writer)
        begun = time.monotonic()
        await within(1, lambda: links)
        with pytest.raises(LinkLost, match=r"nothing came for 0\.9 s") as e:
            await links[0].receive()
        assert e.value.silent >= 0.9
        assert 0.8 < time.monotonic() - begun < 2
        writer.close()


async def test_beats_alone_keep_an_idle_link_alive() -> None:
    async with a_door(silence=0.9) as (door, links):
        ours = await reach(door, silence=0.9)
        await within(1, lambda: links)
        await asyncio.sleep(2)
        ours.send(Say("awake"))
        assert await links[0].receive() == Say("awake")
        await ours.close()


async def test_a_process_that_was_paused_itself_does_not_blame_the_other_side() -> None:
    async with a_door(silence=0.9) as (door, links):
        ours = await reach(door, silence=0.9)
        await within(1, lambda: links)
        time.sleep(1.5)  # both sides are in this loop
        await asyncio.sleep(0.5)
        ours.send(Say("awake"))
        assert await links[0].receive() == Say("awake")
        await ours.close()


async def test_a_call_that_nobody_answers_ends_at_its_deadline() -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        begun = time.monotonic()
        with pytest.raises(OSError, match="silent for 2 s within the handshake"):
            await call(deaf.getsockname(), SECRET, KIND, silence=1, deadline=0.5)
        assert time.monotonic() - begun < 3
        address = deaf.getsockname()
    with pytest.raises(OSError):
        await call(address, SECRET, KIND, silence=1, deadline=0.5)


async def test_a_message_that_is_none_is_not_taken_for_one() -> None:
    async with a_door() as (door, links):
        ours = await reach(door)
        await within(1, lambda: links)
        ours._writer.write(frame([{"type": "Nonsense"}]))
        with pytest.raises(LinkLost, match="not a message"):
            await links[0].receive()
        await ours.close()
