"""Server-sent events: an HTTP response that writes an answer's events as they come and stops when nobody listens."""

from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing

import msgspec
from starlette.types import Receive, Scope, Send

from brigade.engine.output import EngineError
from brigade.serve.answer import Answer
from brigade.serve.errors import ClientGone, api_error, error_body
from brigade.serve.formats import Format
from brigade.serve.life import Life, Line, Wanted, line_of
from brigade.serve.tracer import RequestTrace

DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # asks nginx, where it stands in front of us, not to collect events
]
_json = msgspec.json.Encoder()

Start = Callable[[], Awaitable[Answer]]
"""Starts an answer. Raises EngineError."""


def event(data: object) -> bytes:
    """One server-sent event holding JSON."""
    return b"data: %b\n\n" % _json.encode(data)


def _events(chunks: Iterable[object]) -> bytes:
    """Events that go out in one write."""
    return b"".join(map(event, chunks))


class EventStream:
    """A response that streams an answer.

    1. The answer is started. If it is refused, nothing has been sent and the refusal is raised.
    2. Headers go out at once, so that the client knows that it was accepted.
    3. Each event is sent when it comes; sending waits while the client does not read, and reading the engine with it.
    4. If the engine fails or the server closes, the last event is an error and there is no [DONE].
    5. If the client leaves, the answer is cancelled at once.
    """

    def __init__(self, start: Start, form: Format, with_usage: bool, life: Life, trace: RequestTrace) -> None:
        self._start, self._form, self._with_usage, self._life, self._trace = start, form, with_usage, life, trace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole stream. Raises EngineError before anything is sent, and no later."""
        answer: Answer | None = None
        try:
            try:
                async with Wanted(scope, receive, self._life):
                    answer = await self._start()
                    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                    last = await self._write(answer, send, line_of(scope))
            except EngineError as e:
                if answer is None:
                    raise
                last = event(error_body(api_error(e)))
            await send({"type": "http.response.body", "body": last, "more_body": False})
        except ClientGone:
            return
        finally:
            if answer is not None:
                answer.cancel()
            self._trace.end("stream")
            self._trace.over()

    async def _write(self, answer: Answer, send: Send, line: Line | None) -> bytes:
        """Send all events but the last ones, which are returned. Raises EngineError if the engine fails on the way."""
        form, trace = self._form, self._trace
        if opening := _events(form.opening()):
            await _send(send, line, opening)
        async with aclosing(answer.deltas()) as deltas:
            trace.end("stream")
            async for i, delta in deltas:
                trace.end("wait")
                said = _events(form.piece(i, delta, answer.choices[i]))
                if answer.complete:
                    break
                if said:
                    await _send(send, line, said)
                trace.end("stream")
        return said + (event(form.usage(answer)) if self._with_usage else b"") + DONE


async def _send(send: Send, line: Line | None, data: bytes) -> None:
    if line is None or not line.write(data):
        await send({"type": "http.response.body", "body": data, "more_body": True})
