"""One HTTP connection: uvicorn's protocol with the bounds it lacks. Knows bytes and deadlines, no routes.

What is added:
1. Request line and headers are bounded in bytes (431) and in time; so is what follows an answer that came early.
2. A client that stops reading is cut off, and what it asked for ends with it.
3. A second request sent before the first is answered closes the connection: uvicorn would no longer notice that the
   client of the first one has left. Clients have long stopped doing this.
4. Requests get their connection (`brigade.serve.life.Line`): it writes a piece of a stream, and tells of a client that
   leaves, in a fraction of the time that ASGI's messages take.
"""

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from brigade.serve.config import Limits
from brigade.serve.errors import ApiError, error_body
from brigade.serve.life import LINE


class BoundedProtocol(HttpToolsProtocol):
    """Subclass with `limits` set; uvicorn makes one for each connection."""

    limits = Limits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._gone: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_write_timer()
        super().connection_lost(exc)
        self._tell_gone()

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > self.limits.head_bytes and not self.transport.is_closing():
            self._refuse(ApiError(431, f"the request's headers are larger than {self.limits.head_bytes} bytes"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {LINE: self}  # type: ignore[dict-item]

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_head_timer()
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()
            return
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing():
            self._expect_head()

    def write(self, piece: bytes) -> bool:
        """As a Line."""
        cycle = self.cycle
        if self.flow.write_paused or cycle.disconnected or cycle.response_complete or not cycle.chunked_encoding:
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        return True

    def watch(self, gone: Callable[[], None]) -> None:
        """As a Line."""
        self._gone = gone
        if self.cycle.disconnected:
            self.loop.call_soon(self._tell_gone)

    def unwatch(self) -> None:
        """As a Line."""
        self._gone = None

    def _tell_gone(self) -> None:
        if self._gone is not None:
            self._gone()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def _expect_head(self) -> None:
        self._stop_head_timer()
        self._head_timer = self.loop.call_later(self.limits.head_seconds, self.transport.close)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg))

    def _refuse(self, e: ApiError) -> None:
        body = msgspec.json.encode(error_body(e))
        head = (
            f"HTTP/1.1 {e.status} {HTTPStatus(e.status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def bounded(limits: Limits) -> type[BoundedProtocol]:
    """The protocol class for a server with these limits."""
    return type("BoundedProtocol", (BoundedProtocol,), {"limits": limits})
