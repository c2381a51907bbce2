"""A link between two hosts for asyncio programs: TCP, a handshake over a shared secret, then typed messages.

Life of a link:
1. one side listens (`Door`), the other calls (`call`); each proves that it knows the secret, within two seconds
2. messages go both ways as in `brigade.comm.channel`, and a beat every 0.3 s says that the other side lives
3. lost: the other side closed, sent what is no message, or said nothing for `silence` seconds (a cut cable, a frozen
   host: TCP alone would notice after minutes). `receive` says why, now and at every later call.

What counts as silence are our own rounds in which nothing came, not the clock: after this process itself was paused,
the other side's beats lie unread. The bytes are not sealed: the network between hosts must be one's own.
"""

import asyncio
import hashlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import msgspec

from brigade.comm.channel import ChannelBroken, Inbox, frame
from brigade.comm.handshake import MIN_SECRET, PROOF_SIZE, WELCOME, Differs, Hello, Steps, answering, calling
from brigade.comm.meeting import Address, listen

log = logging.getLogger("brigade.link")

In = TypeVar("In")

BEAT_EVERY = 0.3
HANDSHAKE_S = 2.0
MAX_CALLERS = 64
"""Handshakes at a time. One more ends the oldest: silent callers cannot keep out a host that knows the secret."""
MAX_UNSENT = 1 << 26
"""Bytes that may wait for a slow other side before the link counts as lost."""
_CLOSE_S = 1.0
_MAX_REASONS = 256
_PURPOSE = hashlib.sha256(b"brigade: a link between hosts").digest()
"""In the place of a layout, so that no rank's handshake can pass for a link's, nor a link's for a rank's."""


class LinkLost(ConnectionError):
    """The other side is gone, or as good as gone."""

    def __init__(self, why: str, silent: float = 0.0) -> None:
        super().__init__(why)
        self.silent = silent
        """Seconds that it may have been gone for before this was noticed."""


class Beat(msgspec.Struct, frozen=True, tag=True):
    """Says that this side lives; never seen outside this module."""


class Link(Generic[In]):
    """One end of a link whose handshake is over. Use it from one event loop, and close it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kind: Any, silence: float) -> None:
        self.peer = _name(writer)
        """Address of the other side, for people."""
        self._reader, self._writer, self._silence = reader, writer, max(silence, 2 * BEAT_EVERY)
        self._inbox = Inbox[Any](kind | Beat)
        self._came: asyncio.Queue[In | LinkLost] = asyncio.Queue()
        self._lost: LinkLost | None = None
        self._n_heard = 0
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._beat())]

    def send(self, *messages: Any) -> None:
        """Queue messages. That the other side is gone shows in `receive`."""
        if self._lost is None and not self._writer.is_closing():
            self._writer.write(frame(messages))

    async def receive(self) -> In:
        """The next message. Raises LinkLost, which says why, once all that came before is taken."""
        if self._lost is not None and self._came.empty():
            raise LinkLost(str(self._lost), self._lost.silent)
        message = await self._came.get()
        if isinstance(message, LinkLost):
            raise message
        return message

    async def close(self) -> None:
        """Send what is queued if that goes fast, and end the link. Harmless when called twice."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._lose("it was closed here", abort=False)
        self._writer.close()
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self._writer.wait_closed()
        except TimeoutError:
            self._writer.transport.abort()
        except OSError:
            return

    async def _listen(self) -> None:
        try:
            while data := await self._reader.read(1 << 20):
                self._n_heard += 1
                for message in self._inbox.feed(data):
                    if not isinstance(message, Beat):
                        self._came.put_nowait(message)
            self._lose("it closed the connection")
        except (OSError, ChannelBroken) as e:
            self._lose(str(e))

    async def _beat(self) -> None:
        n_silent, n_heard = 0, 0
        while self._lost is None:
            self.send(Beat())
            await asyncio.sleep(BEAT_EVERY)
            n_silent = n_silent + 1 if self._n_heard == n_heard else 0
            n_heard = self._n_heard
            if n_silent >= round(self._silence / BEAT_EVERY):
                self._lose(f"nothing came for {n_silent * BEAT_EVERY:.1f} s", silent=(n_silent + 1) * BEAT_EVERY)
            elif self._writer.transport.get_write_buffer_size() > MAX_UNSENT:
                self._lose("it does not read what is sent")

    def _lose(self, why: str, abort: bool = True, silent: float = 0.0) -> None:
        if self._lost is None:
            self._lost = LinkLost(f"{self.peer}: {why}", silent)
            self._came.put_nowait(self._lost)
        if abort:
            self._writer.transport.abort()


class Door(Generic[In]):
    """Listens for callers that know the secret, and for nobody else."""

    def __init__(
        self,
        secret: bytes,
        kind: Any,
        silence: float,
        on_link: Callable[[Link[In]], Awaitable[None]],
        on_differs: Callable[[str, Differs], None] = lambda peer, error: None,
    ) -> None:
        """`on_link` gets every link in a task of its own; `on_differs` a caller's address and why it was turned away,
        though it knows the secret. Raises ValueError for a secret that is too short."""
        self._secret, self._kind, self._silence = checked_secret(secret), kind, silence
        self._on_link, self._on_differs = on_link, on_differs
        self._callers: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        """Whose handshake is under way, oldest first."""
        self._links: set[asyncio.Task[None]] = set()
        self._reasons: set[tuple[str, str]] = set()
        self._server: asyncio.Server
        self.address: Address

    async def open(self, address: Address) -> None:
        """Listen on exactly this address; port 0 takes a free one. Raises OSError."""
        sock = listen(*address)
        self.address = sock.getsockname()[:2]
        self._server = await asyncio.start_server(self._on_caller, sock=sock)

    async def close(self) -> None:
        """End listening, handshakes and the tasks of links; whoever has a link closes it."""
        self._server.close()
        tasks = [*self._callers, *self._links]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _on_caller(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._callers) >= MAX_CALLERS:
            oldest = next(iter(self._callers))
            self._callers.pop(oldest).transport.abort()
            oldest.cancel()
        task = asyncio.create_task(self._welcome(reader, writer))
        self._callers[task] = writer
        task.add_done_callback(lambda t: self._callers.pop(t, None))

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = _name(writer)
        try:
            await _shake(answering(_hello(), self._secret), reader, writer)
            writer.write(WELCOME)
        except Differs as e:
            self._on_differs(peer, e)
            writer.close()
            return
        except OSError as e:
            self._note(peer, str(e))
            writer.transport.abort()
            return
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
        task = asyncio.ensure_future(self._on_link(Link(reader, writer, self._kind, self._silence)))
        self._links.add(task)
        task.add_done_callback(self._links.discard)

    def _note(self, peer: str, why: str) -> None:
        """Log a stranger once for each reason: whoever can connect must not be able to fill the log."""
        reason = (peer.rpartition(":")[0], why)
        if reason not in self._reasons and len(self._reasons) < _MAX_REASONS:
            self._reasons.add(reason)
            log.warning("%s called and was turned away: %s (more of this kind is not logged)", peer, why)


async def call(address: Address, secret: bytes, kind: Any, *, silence: float, deadline: float) -> Link[Any]:
    """Call a door once: up to `deadline` seconds for the connection, and two for the handshake.

    Raises Refused if the other side has another secret or version, OSError if it cannot be reached or is silent.
    """
    checked_secret(secret)
    try:
        async with asyncio.timeout(deadline):
            reader, writer = await asyncio.open_connection(*address)
    except TimeoutError:
        raise TimeoutError(f"no answer within {deadline:g} s") from None
    try:
        if writer.get_extra_info("sockname") == writer.get_extra_info("peername"):
            raise ConnectionError("nobody listens there")  # TCP connected the socket to itself
        await _shake(calling(_hello(), secret), reader, writer)
    except BaseException:
        writer.transport.abort()
        raise
    return Link(reader, writer, kind, silence)


def checked_secret(secret: bytes) -> bytes:
    """The secret if it is long enough. Raises ValueError."""
    if len(secret) < MIN_SECRET:
        raise ValueError(f"secret: needs at least {MIN_SECRET} bytes, not {len(secret)}")
    return secret


async def _shake(steps: Steps, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Run one side of a handshake. Raises Refused, OSError, and TimeoutError (an OSError) after two seconds."""
    if (sock := writer.get_extra_info("socket")) is not None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    n = 0
    try:
        async with asyncio.timeout(HANDSHAKE_S):
            data, n = next(steps)
            while True:
                writer.write(data)
                await writer.drain()
                data, n = steps.send(await reader.readexactly(n))
    except StopIteration:
        return
    except asyncio.IncompleteReadError:
        if n == PROOF_SIZE:  # it has seen our proof by now, which is wrong to whoever has another secret
            raise ConnectionError(
                "it left without a proof that it knows the secret; does it have the same one?"
            ) from None
        raise ConnectionError("it closed the connection within the handshake") from None
    except TimeoutError:
        raise TimeoutError(f"it was silent for {HANDSHAKE_S:g} s within the handshake") from None


def _hello() -> Hello:
    return Hello(0, 0, 0, _PURPOSE, os.urandom(32))


def _name(writer: asyncio.StreamWriter) -> str:
    at = writer.get_extra_info("peername")
    return f"{at[0]}:{at[1]}" if at else "a caller that left"
