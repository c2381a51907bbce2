"""POST /debug/trace: has this process and all ranks record what they do for a while. Writes no trace: that is the
client's part.

1. Requests that begin while it is on get a `RequestTrace`, which their handlers tell how far they are. All others get
   one that does nothing.
2. All ranks are told to record, for so long at most. Headers go out then: what is asked from now on is recorded.
3. When the time is over, or the one request that was asked for has ended, all ranks stop and tell. One that does not
   tell is named in what the client gets.
"""

import asyncio
import re
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import msgspec
from pydantic import Field, FiniteFloat
from starlette.requests import Request as HttpRequest
from starlette.types import Receive, Scope, Send

from brigade.core.laps import MOST, Lap, Laps
from brigade.engine.output import EngineError
from brigade.engine.recorder import CLOCK_EVERY, RankSpans
from brigade.serve.errors import ApiError, ClientGone, api_error, error_body
from brigade.serve.life import Life, Wanted
from brigade.serve.schema import Request

if TYPE_CHECKING:
    from brigade.engine.fleet import Fleet

MOST_SECONDS = 60.0
MOST_REQUESTS, MOST_PARTS, MOST_MOVES = 4096, 1 << 13, 1 << 16
"""Requests of one recording, spans of each, and changes of state of all: those that come later are left out."""
MOST_SPANS = 1 << 20
"""Of all ranks together; each keeps its share of them, or what `Laps` keeps if that is less."""
MARGIN = 5.0
"""Seconds after which ranks stop by themselves if nobody tells them to."""
_NAME = re.compile(r"[!-~]{1,128}")


class TraceRequest(Request):
    """POST /debug/trace"""

    seconds: Annotated[FiniteFloat, Field(gt=0, le=MOST_SECONDS)]
    request: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """The X-Request-Id of a request: the recording ends when it has ended, if that is sooner."""


@dataclass(slots=True)
class RequestSpans:
    """One request as this process saw it; nanoseconds of CLOCK_MONOTONIC."""

    name: str
    """What its client called it in X-Request-Id, or the id of its answer."""
    rids: list[int]
    """What the engine calls its choices."""
    began: int
    ended: int
    """0 if it had not."""
    parts: list[Lap]


@dataclass(slots=True)
class UnitSpans:
    name: str
    role: str
    restarts: int
    """Processes that were replaced meanwhile: what they had recorded is lost."""
    ranks: list[RankSpans]


@dataclass(slots=True)
class Recording:
    """All that was recorded."""

    began: int
    ended: int
    requests: list[RequestSpans]
    placed: list[tuple[int, int]]
    """(rid, number under which a rank works for it), for fleets."""
    moved: list[tuple[int, str, int]]
    """(rid, state of its hand-over, when)."""
    units: list[UnitSpans]


class RequestTrace:
    """How far a request is. The one that is given out while nobody records does nothing."""

    def __init__(self, tracer: "Tracer | None" = None, name: str = "") -> None:
        self._tracer, self.name = tracer, name
        self._laps = Laps(time.monotonic_ns)
        self._rids: list[int] = []
        self._began = self._ended = 0
        if tracer is not None:
            self._began = time.monotonic_ns()
            self._laps.record(MOST_PARTS)
        self.end = self._laps.end
        """Call it with the name of a part when that has ended."""

    def known_as(self, answer_id: str, rids: list[int]) -> None:
        """It has been given to the engine."""
        if self._tracer is not None:
            self.name, self._rids = self.name or answer_id, rids

    def over(self) -> None:
        if self._tracer is not None and not self._ended:
            self._ended = time.monotonic_ns()
            self._tracer.over(self)

    def spans(self) -> RequestSpans:
        parts, _ = self._laps.take()
        return RequestSpans(self.name or "unnamed", self._rids, self._began, self._ended, parts)


_OFF = RequestTrace()


class Tracer:
    """One recording at a time. Use it from one event loop."""

    def __init__(self) -> None:
        self._on = False
        self._only: str | None = None
        self._over = asyncio.Event()
        self._began = 0
        self._restarts: list[int] = []
        """Of each unit, when the recording began."""
        self._requests: list[RequestTrace] = []
        self._placed: deque[tuple[int, int]] = deque(maxlen=MOST_MOVES)
        self._moved: deque[tuple[int, str, int]] = deque(maxlen=MOST_MOVES)

    def begin(self, request: HttpRequest) -> RequestTrace:
        """A request has come."""
        if not self._on or len(self._requests) >= MOST_REQUESTS:
            return _OFF
        given = request.headers.get("x-request-id", "")
        trace = RequestTrace(self, given if _NAME.fullmatch(given) else "")
        self._requests.append(trace)
        return trace

    def over(self, trace: RequestTrace) -> None:
        """A request that was recorded has ended."""
        if self._only is not None and trace.name == self._only:
            self._over.set()

    def placed(self, rid: int, part: int) -> None:
        """As an Observer."""
        if self._on:
            self._placed.append((rid, part))

    def moved(self, rid: int, state: str) -> None:
        """As an Observer."""
        if self._on:
            self._moved.append((rid, state, time.monotonic_ns()))

    def start(self, engine: "Fleet", seconds: float, only: str | None) -> None:
        """Record from now on. Raises ApiError if somebody else does."""
        if self._on:
            raise ApiError(409, "another recording runs; try again when it has ended", code="recording")
        self._on, self._only, self._began = True, only, time.monotonic_ns()
        self._over.clear()
        members = engine.crew.members
        self._restarts = [member.engine.n_restarts for member in members]
        most = min(MOST, MOST_SPANS // sum(member.engine.config.ranks for member in members))
        for member in members:
            member.engine.recorder.start(seconds + MARGIN, most)

    async def finish(self, engine: "Fleet", seconds: float, life: Life) -> Recording:
        """Wait until the time is over, the request has ended or the server is to end, and collect."""
        units = [(member, member.engine.recorder) for member in engine.crew.members]
        until = time.monotonic() + seconds
        while not (self._over.is_set() or life.draining) and (left := until - time.monotonic()) > 0:
            for _, recorder in units:
                recorder.ask_clocks()
            try:
                await asyncio.wait_for(self._over.wait(), min(left, CLOCK_EVERY))
            except TimeoutError:
                continue
        ended = time.monotonic_ns()
        requests = [trace.spans() for trace in self._requests]
        told = await asyncio.gather(*(recorder.collect() for _, recorder in units))
        spans = [
            UnitSpans(member.name, member.role, member.engine.n_restarts - before, ranks)
            for (member, _), before, ranks in zip(units, self._restarts, told, strict=True)
        ]
        return Recording(self._began, ended, requests, list(self._placed), list(self._moved), spans)

    def stop(self, engine: "Fleet") -> None:
        """The recording is over, however it ended."""
        self._on = False
        self._requests.clear()
        self._placed.clear()
        self._moved.clear()
        for member in engine.crew.members:
            member.engine.recorder.stop()


class TraceReply:
    """The response that records. It is one JSON object: a Recording, or an error as everywhere else."""

    def __init__(self, tracer: Tracer, engine: "Fleet", asked: TraceRequest, life: Life) -> None:
        self._tracer, self._engine, self._asked, self._life = tracer, engine, asked, life

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError before anything is sent, and no later."""
        self._tracer.start(self._engine, self._asked.seconds, self._asked.request)
        try:
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            # Something must go out, or a proxy would hold the headers back: white space may stand before JSON.
            await send({"type": "http.response.body", "body": b" ", "more_body": True})
            try:
                async with Wanted(scope, receive, self._life):
                    body = msgspec.json.encode(await self._tracer.finish(self._engine, self._asked.seconds, self._life))
            except EngineError as e:
                body = msgspec.json.encode(error_body(api_error(e)))
            await send({"type": "http.response.body", "body": body, "more_body": False})
        except ClientGone:
            return
        finally:
            self._tracer.stop(self._engine)
