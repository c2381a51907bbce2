"""The channel: whatever the bytes are and however they are cut, messages arrive whole or the channel says it broke."""

import asyncio
import os
import resource
import socket
import threading
from collections.abc import Iterator
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brigade.comm.channel import MAX_FRAME, AsyncChannel, Channel, ChannelBroken, ChannelClosed, Inbox, frame
from brigade.engine.messages import Abort, Add, Failed, FromWorker, Loading, Logprob, Pong, Stats, Step, Token, ToWorker
from brigade.spec.sampling import SamplingParams

STATS = Stats(1, 2, 3, 4, 5)
SPOKEN = [
    Loading(1, 2),
    Failed("x" * 300),
    Step([Token(1, 2, "stop", -0.5, [Logprob(7, -1.5)], 16), Token(3, 4)], STATS),
    Pong(9, STATS),
]


def wire(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@given(st.lists(st.integers(0, len(frame(SPOKEN))), max_size=12))
def test_messages_arrive_in_order_however_the_bytes_are_cut(cuts: list[int]) -> None:
    data, inbox = frame(SPOKEN), Inbox[FromWorker](FromWorker)
    edges = [0, *sorted(cuts), len(data)]
    got = [m for a, b in pairwise(edges) for m in inbox.feed(data[a:b])]
    assert got == SPOKEN


def test_every_single_byte_may_come_alone() -> None:
    inbox = Inbox[FromWorker](FromWorker)
    assert [m for b in frame(SPOKEN) for m in inbox.feed(bytes([b]))] == SPOKEN


def test_sampling_parameters_survive_the_wire() -> None:
    params = SamplingParams(
        seed=-5, stop=("a", "é"), stop_token_ids=(3,), logit_bias=((1, -100.0), (2, 0.5)), logprobs=0, ignore_eos=True
    )
    add = Add(1, [1, 2, 3], params, "tenant")
    assert Inbox[ToWorker](ToWorker).feed(frame([add])) == [add]


@given(st.lists(st.binary(max_size=64), max_size=6))
def test_random_bytes_break_the_channel_and_raise_nothing_else(pieces: list[bytes]) -> None:
    inbox = Inbox[FromWorker](FromWorker)
    try:
        for piece in pieces:
            inbox.feed(piece)
    except ChannelBroken:
        return


@given(st.binary(max_size=80))
def test_random_bodies_in_good_frames_break_the_channel_and_raise_nothing_else(body: bytes) -> None:
    inbox = Inbox[FromWorker](FromWorker)
    try:
        assert inbox.feed(wire(body))  # a body that happens to be a message is fine
    except ChannelBroken:
        return


@given(st.data())
def test_one_changed_byte_breaks_the_channel_or_gives_another_message(data: st.DataObject) -> None:
    good = frame(SPOKEN)
    at = data.draw(st.integers(0, len(good) - 1))
    bad = good[:at] + bytes([data.draw(st.integers(0, 255))]) + good[at + 1 :]
    try:
        Inbox[FromWorker](FromWorker).feed(bad)
    except ChannelBroken:
        return


@pytest.mark.parametrize(
    "body",
    [
        b"\x82\xa4type\xa6Failed\xa7message\xa2\xff\xfe",
        b"\x82\xa4type\xa6Failed\xa1x" + b"\x91" * 100_000 + b"\xc0",
        b"\x82\xa4type\xa4Step\xa6tokens\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"",
        b"\xc0",
        msgspec.msgpack.encode({"type": "Nobody"}),
        msgspec.msgpack.encode({"type": "Loading", "done": "1", "total": 2}),
    ],
    ids=["not utf-8", "deeply nested", "huge array", "huge map", "empty", "nil", "unknown type", "wrong field type"],
)
def test_a_body_that_is_no_message_breaks_the_channel(body: bytes) -> None:
    with pytest.raises(ChannelBroken):
        Inbox[FromWorker](FromWorker).feed(wire(body))


def test_a_huge_announced_length_is_refused_at_once() -> None:
    with pytest.raises(ChannelBroken, match=str(MAX_FRAME + 1)):
        Inbox[FromWorker](FromWorker).feed((MAX_FRAME + 1).to_bytes(4, "big"))


def test_the_longest_length_that_is_allowed_waits_for_its_bytes_without_reserving_them() -> None:
    inbox = Inbox[FromWorker](FromWorker)
    assert inbox.feed(MAX_FRAME.to_bytes(4, "big") + b"x") == []
    assert len(inbox._bytes) == 5


def test_a_message_longer_than_a_frame_is_not_sent() -> None:
    with pytest.raises(ValueError, match="longer than a frame"):
        frame([Failed("x" * (MAX_FRAME + 1))])


def test_part_of_a_message_is_no_message_yet(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    channel = Channel[FromWorker](theirs, FromWorker)
    data = frame([SPOKEN[1]])
    ours.sendall(data[:20])
    assert channel.poll(1) == []
    assert channel.poll(0) == []
    ours.sendall(data[20:])
    assert channel.poll(1) == [SPOKEN[1]]


def test_polling_does_not_wait_longer_than_asked(pair: tuple[socket.socket, socket.socket]) -> None:
    assert Channel[FromWorker](pair[1], FromWorker).poll(0) == []
    assert Channel[FromWorker](pair[1], FromWorker).poll(0.02) == []


def test_a_closed_peer_shows_when_receiving_and_when_sending(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    channel = Channel[FromWorker](theirs, FromWorker)
    channel.send(Abort(1))
    ours.close()
    with pytest.raises(ChannelClosed):
        channel.poll(None)
    with pytest.raises(ChannelClosed):
        channel.send(Abort(1))


def test_messages_sent_before_the_peer_closed_still_arrive(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    Channel[ToWorker](ours, ToWorker).send(*SPOKEN)
    ours.close()
    channel = Channel[FromWorker](theirs, FromWorker)
    assert channel.poll(1) == SPOKEN
    with pytest.raises(ChannelClosed):
        channel.poll(1)


def test_large_messages_go_both_ways_at_once(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    big = [Failed(ch * 5_000_000) for ch in "ab"]

    def blocking_end() -> None:
        channel = Channel[FromWorker](theirs, FromWorker)
        got: list[FromWorker] = []
        while len(got) < 2:
            got += channel.poll(5)
        channel.send(*got)

    async def asyncio_end() -> list[FromWorker]:
        channel: AsyncChannel[FromWorker] = await AsyncChannel.over(ours, FromWorker)
        channel.send(*big)
        got: list[FromWorker] = []
        while len(got) < 2:
            got += await channel.receive()
        channel.close()
        return got

    thread = threading.Thread(target=blocking_end)
    thread.start()
    assert asyncio.run(asyncio.wait_for(asyncio_end(), 20)) == big
    thread.join(5)
    assert not thread.is_alive()


async def test_the_asyncio_end_sees_that_its_peer_closed(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    channel: AsyncChannel[FromWorker] = await AsyncChannel.over(ours, FromWorker)
    theirs.sendall(frame([SPOKEN[0]]) + b"\0\0")
    theirs.close()
    assert await channel.receive() == [SPOKEN[0]]
    with pytest.raises(ChannelClosed):
        await channel.receive()
    channel.send(Abort(1))
    channel.close()
    channel.send(Abort(1))  # sending after the end is harmless


async def test_the_asyncio_end_breaks_on_nonsense(pair: tuple[socket.socket, socket.socket]) -> None:
    channel: AsyncChannel[FromWorker] = await AsyncChannel.over(pair[0], FromWorker)
    pair[1].sendall(b"\xff" * 8)
    with pytest.raises(ChannelBroken):
        await channel.receive()
    channel.close()


def test_a_channel_works_with_a_file_number_above_1023(pair: tuple[socket.socket, socket.socket]) -> None:
    """A server with a thousand connections hands such a number to the worker that it restarts."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1600:
        pytest.skip("this process may not open so many files")
    high = 1500
    os.dup2(pair[1].fileno(), high)
    with socket.socket(fileno=high) as theirs:
        pair[0].sendall(frame([SPOKEN[0]]))
        assert Channel[FromWorker](theirs, FromWorker).poll(1) == [SPOKEN[0]]
