"""Typed messages over a connected stream socket: a length, then msgpack. Knows neither the messages nor the processes.

A socket pair inherited by a child has no address, so nobody else can speak on it, and it reports at once when either
side dies.
"""

import asyncio
import select
import socket
import threading
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import msgspec

In = TypeVar("In")
MAX_FRAME = 1 << 26
"""Longest message in bytes; more is a broken peer."""
_LENGTH = 4


class ChannelClosed(ConnectionError):
    """The other side is gone."""


class ChannelBroken(ConnectionError):
    """The other side sent what is not a message."""


def frame(messages: Iterable[Any]) -> bytes:
    """Messages as bytes for the wire."""
    encode = msgspec.msgpack.Encoder().encode
    out = bytearray()
    for m in messages:
        body = encode(m)
        if len(body) > MAX_FRAME:
            raise ValueError(f"a message of {len(body)} bytes is longer than a frame may be ({MAX_FRAME})")
        out += len(body).to_bytes(_LENGTH, "big")
        out += body
    return bytes(out)


class Inbox(Generic[In]):
    """Cuts a stream of bytes into messages of one type."""

    def __init__(self, kind: Any) -> None:
        self._decode = msgspec.msgpack.Decoder(kind).decode
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[In]:
        """Messages that are complete with `data`. Raises ChannelBroken for what is none."""
        self._bytes += data
        out: list[In] = []
        at = 0
        while len(self._bytes) - at >= _LENGTH:
            n = int.from_bytes(self._bytes[at : at + _LENGTH], "big")
            if n > MAX_FRAME:
                raise ChannelBroken(f"a frame of {n} bytes was announced; {MAX_FRAME} is the limit")
            if len(self._bytes) - at - _LENGTH < n:
                break
            try:
                out.append(self._decode(memoryview(self._bytes)[at + _LENGTH : at + _LENGTH + n]))
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
                raise ChannelBroken(f"not a message: {e}") from e
            at += _LENGTH + n
        del self._bytes[:at]
        return out


class Channel(Generic[In]):
    """The blocking end, for a process with a loop of its own. Any thread may send."""

    def __init__(self, sock: socket.socket, kind: Any) -> None:
        sock.setblocking(True)
        self._sock, self._inbox = sock, Inbox[In](kind)
        self._sending = threading.Lock()
        self._readable = select.poll()  # select() cannot watch file numbers beyond 1023
        self._readable.register(sock, select.POLLIN)

    def send(self, *messages: Any) -> None:
        """Raises ChannelClosed if the other side is gone."""
        try:
            with self._sending:  # a long message goes out in pieces
                self._sock.sendall(frame(messages))
        except OSError as e:
            raise ChannelClosed(str(e)) from e

    def poll(self, timeout: float | None) -> list[In]:
        """Messages that are here, waiting up to `timeout` seconds (None: until there are any) for the first bytes.

        May be empty when only part of a message came. Raises ChannelClosed.
        """
        if not self._readable.poll(None if timeout is None else 1000 * timeout):
            return []
        try:
            data = self._sock.recv(1 << 20)
        except OSError as e:
            raise ChannelClosed(str(e)) from e
        if not data:
            raise ChannelClosed("the other side closed the channel")
        return self._inbox.feed(data)


class AsyncChannel(Generic[In]):
    """The end for an asyncio program."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kind: Any) -> None:
        self._reader, self._writer, self._inbox = reader, writer, Inbox[In](kind)

    @classmethod
    async def over(cls, sock: socket.socket, kind: Any) -> "AsyncChannel[In]":
        reader, writer = await asyncio.open_connection(sock=sock)
        return cls(reader, writer, kind)

    def send(self, *messages: Any) -> None:
        """Queue messages for sending. A dead peer shows in receive()."""
        if not self._writer.is_closing():
            self._writer.write(frame(messages))

    async def receive(self) -> list[In]:
        """The next messages. Raises ChannelClosed."""
        try:
            data = await self._reader.read(1 << 20)
        except OSError as e:
            raise ChannelClosed(str(e)) from e
        if not data:
            raise ChannelClosed("the other side closed the channel")
        return self._inbox.feed(data)

    def close(self) -> None:
        self._writer.close()
