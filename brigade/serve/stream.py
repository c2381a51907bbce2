"""Server-sent events: an HTTP response that writes an answer's events as they come and stops when nobody listens."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from brigade.engine.output import EngineError
from brigade.serve.answer import Answer, Life, while_wanted
from brigade.serve.errors import ClientGone, api_error, error_body
from brigade.serve.formats import Format

DONE = b"data: [DONE]\n\n"


def event(data: object) -> bytes:
    """One server-sent event holding JSON."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


async def events(answer: Answer, form: Format, with_usage: bool) -> AsyncGenerator[bytes, None]:
    """An answer's events up to [DONE]. Raises EngineError if the engine fails on the way."""
    for chunk in form.opening():
        yield event(chunk)
    async with aclosing(answer.deltas()) as deltas:
        async for i, delta in deltas:
            # What one delta gives goes out in one write.
            said = b"".join(event(chunk) for chunk in form.piece(i, delta, answer.choices[i]))
            if said:
                yield said
    if with_usage:
        yield event(form.usage(answer))
    yield DONE


class EventStream(Response):
    """Streams an answer.

    1. Headers go out at once, so that the client knows that it was accepted.
    2. Each event is sent when it comes; sending waits while the client does not read, and reading the engine with it.
    3. If the engine fails or the server closes, the last event is an error and there is no [DONE].
    4. If the client leaves, the answer is cancelled at once.
    """

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, form: Format, with_usage: bool, life: Life) -> None:
        # X-Accel-Buffering asks nginx, where it stands in front of us, not to collect events.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._answer, self._form, self._with_usage, self._life = answer, form, with_usage, life

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole stream."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await while_wanted(self._write(send), receive, self._life)
            except EngineError as e:
                await _send(send, event(error_body(api_error(e))))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientGone:
            return
        finally:
            self._answer.cancel()

    async def _write(self, send: Send) -> None:
        async with aclosing(events(self._answer, self._form, self._with_usage)) as all_events:
            async for data in all_events:
                await _send(send, data)


async def _send(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})
