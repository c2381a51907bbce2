"""For how long an answer is wanted: until its client leaves or the server closes. Knows no answers."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from starlette.types import Receive, Scope

from brigade.engine.output import Unavailable
from brigade.serve.errors import ClientGone

LINE = "brigade.line"
"""The ASGI extension under which a server of our own gives a request the connection that it came on."""


class Line(Protocol):
    """A connection, for a request that is answered in many pieces."""

    def write(self, piece: bytes) -> bool:
        """Send a piece of a streamed body now. False where that cannot be: then send it as ASGI says, which waits."""

    def watch(self, gone: Callable[[], None]) -> None:
        """Call this when the client leaves before its answer is complete, soon if it has left."""

    def unwatch(self) -> None: ...


class Life:
    """Where the server is between its start and its end. The server writes it, routes read it."""

    def __init__(self) -> None:
        self.draining = False
        self.closed = False
        """Running requests must end now."""
        self._wanted: set[Wanted] = set()

    def close(self) -> None:
        """End all running requests."""
        self.closed = True
        for wanted in list(self._wanted):
            wanted.end(_closing())

    def enter(self, wanted: "Wanted") -> None:
        """Raises Unavailable when it is too late."""
        if self.closed:
            raise _closing()
        self._wanted.add(wanted)

    def leave(self, wanted: "Wanted") -> None:
        self._wanted.discard(wanted)


class Wanted:
    """A context that is cancelled when the client leaves, which raises ClientGone, or the server closes, which raises
    Unavailable.

    `receive` must have given the whole request body, so that a disconnect is all it can report. It is asked by a task
    where the server gives no Line.
    """

    def __init__(self, scope: Scope, receive: Receive, life: Life) -> None:
        self._line: Line | None = line_of(scope)
        self._receive, self._life = receive, life
        self._why: Exception | None = None

    async def __aenter__(self) -> None:
        self._life.enter(self)
        task = asyncio.current_task()
        assert task is not None
        self._task, self._n_cancelled = task, task.cancelling()
        if self._line is not None:
            self._line.watch(self._gone)
            return
        self._watch = asyncio.ensure_future(_disconnect(self._receive))
        self._watch.add_done_callback(self._on_end)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._life.leave(self)
        if self._line is not None:
            self._line.unwatch()
        else:
            self._watch.cancel()
        # As asyncio.timeout does it: a cancellation from elsewhere goes on.
        if self._why is not None and self._task.uncancel() <= self._n_cancelled and kind is asyncio.CancelledError:
            raise self._why from None

    def end(self, why: Exception) -> None:
        """Cancel what runs in this context; leaving it raises `why`."""
        if self._why is None:
            self._why = why
            self._task.cancel()

    def _gone(self) -> None:
        self.end(ClientGone())

    def _on_end(self, watch: "asyncio.Task[None]") -> None:
        if not watch.cancelled() and watch.exception() is None:
            self._gone()


def line_of(scope: Scope) -> Line | None:
    """The connection of a request, if the server gives it."""
    line: Line | None = scope.get("extensions", {}).get(LINE)
    return line


def _closing() -> Unavailable:
    return Unavailable("the server is shutting down")


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
