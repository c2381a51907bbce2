"""Reads request bodies: bounded in bytes and in time. Does not look at what they say, but for their content type."""

import asyncio

from starlette.requests import Request

from brigade.serve.config import Limits
from brigade.serve.errors import ApiError, ClientGone


class BodyReader:
    """Reads bodies of all connections, and bounds the memory that unfinished ones hold together."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = 0

    async def read(self, request: Request) -> bytes:
        """The whole body of a JSON request. Raises ApiError 408, 413, 415 or 503, and ClientGone."""
        _require_json(request)
        limit = self._limits.body_bytes
        if int(request.headers.get("content-length") or 0) > limit:
            raise _too_large(limit)
        parts: list[bytes] = []
        n_bytes = 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                more = True
                while more:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    part, more = message.get("body", b""), message.get("more_body", False)
                    n_bytes += len(part)
                    self._held += len(part)
                    if n_bytes > limit:
                        raise _too_large(limit)
                    if self._held > self._limits.all_bodies_bytes:
                        raise ApiError(503, "too many large requests arrive at once", headers={"Retry-After": "1"})
                    parts.append(part)
        except TimeoutError:
            raise ApiError(
                408,
                f"the request body did not arrive within {self._limits.body_seconds:g} s",
                headers={"Connection": "close"},
            ) from None
        finally:
            self._held -= n_bytes
        return b"".join(parts)


def _require_json(request: Request) -> None:
    # Beyond tidiness: a web page elsewhere can send other types without asking the browser's leave, JSON it cannot.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type must be application/json, not {kind[:100] or 'missing'}")


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the request body is larger than {limit} bytes", code="body_too_large")
