"""A TCP way between ranks on which rows stall, change, come twice or break off."""

import asyncio
import contextlib
import socket
from enum import StrEnum, auto
from typing import Any

import msgspec

from brigade.engine.fleet import Fleet
from tests.scenarios.fleets import engines

HARMLESS = 1000
"""Bytes of a connection that pass unharmed: the handshake is over by then, and rows are on their way."""


class Harm(StrEnum):
    STALL = auto()
    CORRUPT = auto()
    TWICE = auto()
    """A piece is delivered again."""
    CUT = auto()


class Link:
    """Stands between the decode ranks of a fleet and the addresses at which its prefill ranks offer rows."""

    def __init__(self, fleet: Fleet) -> None:
        """From now on the ranks hear of addresses that lead through here."""
        self._ways: dict[str, str] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._harm, self._left = Harm.STALL, 0
        self._healed = asyncio.Event()
        for engine in engines(fleet):
            tell, enter = engine.tell, engine.enter
            engine.tell = lambda rid, m, tell=tell: tell(rid, self._through_here(m))  # type: ignore[method-assign]
            engine.enter = lambda part, rank, m, enter=enter: enter(part, rank, self._through_here(m))  # type: ignore[method-assign]

    def harm(self, what: Harm, times: int) -> None:
        """Do this to so many of the connections from now on."""
        self._harm, self._left = what, times
        self._healed.clear()

    def heal(self) -> None:
        """Harm no other connection, and close those that stall."""
        self._left = 0
        self._healed.set()

    @property
    def n_files(self) -> int:
        """Of the open files of this process, those that are the listeners here."""
        return len(self._ways)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _through_here(self, message: Any) -> Any:
        """The message, with other addresses in it."""
        if not isinstance(message, msgspec.Struct):
            return message
        fields = {f: self._through_here(getattr(message, f)) for f in message.__struct_fields__}
        if address := fields.get("address"):
            fields["address"] = self._ways.get(address) or self._way(address)
        return type(message)(**fields)

    def _way(self, address: str) -> str:
        sock = socket.create_server(("127.0.0.1", 0))
        self._ways[address] = f"127.0.0.1:{sock.getsockname()[1]}"
        self._start(self._serve(sock, address))
        return self._ways[address]

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, sock: socket.socket, address: str) -> None:
        async def connected(near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
            host, _, port = address.rpartition(":")
            try:
                far_in, far_out = await asyncio.open_connection(host, int(port))
            except OSError:
                near_out.close()
                return
            harm = None
            if self._left:
                self._left, harm = self._left - 1, self._harm
            self._start(self._pump(near_in, far_out, None))
            self._start(self._pump(far_in, near_out, harm))

        async with await asyncio.start_server(connected, sock=sock) as server:
            await server.serve_forever()

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, harm: Harm | None) -> None:
        n = 0
        with contextlib.suppress(OSError), contextlib.closing(target):
            while data := await source.read(1 << 16 if n > HARMLESS else HARMLESS):
                if harm and n > HARMLESS:
                    if harm is Harm.STALL:
                        await self._healed.wait()
                    if harm in (Harm.STALL, Harm.CUT):
                        return
                    data = data + data if harm is Harm.TWICE else bytes(b ^ 0xFF for b in data)
                    harm = None
                target.write(data)
                await target.drain()
                n += len(data)
