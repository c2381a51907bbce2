"""How the server says no: OpenAI's error shape for everything. Decides nothing about what is an error."""

import math
from typing import Any

import msgspec
from starlette.responses import Response

from brigade.engine.output import BadRequest, EngineError, NotAllowed, QueueFull, Unavailable, UnknownUnit

UNAVAILABLE_RETRY_SECONDS = 2
"""A restarted worker is back within seconds; clients that honour Retry-After then find it."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """An answer other than success, found by the server itself."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers or {}


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


def api_error(e: EngineError) -> ApiError:
    """What an engine's refusal means in HTTP."""
    if isinstance(e, BadRequest):
        return ApiError(400, str(e), param=e.param, code=e.code)
    if isinstance(e, QueueFull):
        wait = max(1, math.ceil(e.retry_after))
        return ApiError(429, str(e), code="queue_full", headers={"Retry-After": str(wait)})
    if isinstance(e, Unavailable):
        return ApiError(503, str(e), code="unavailable", headers={"Retry-After": str(UNAVAILABLE_RETRY_SECONDS)})
    if isinstance(e, UnknownUnit):
        return ApiError(404, str(e), code="unknown_unit")
    if isinstance(e, NotAllowed):
        return ApiError(409, str(e), code="not_allowed")
    return ApiError(500, str(e), code="engine_error")


def error_body(e: ApiError) -> dict[str, Any]:
    """The JSON object that carries an error, in an answer or as a stream's last event."""
    kind = _TYPES.get(e.status, "invalid_request_error")
    return {"error": {"message": str(e), "type": kind, "param": e.param, "code": e.code}}


def error_response(e: ApiError) -> Response:
    """The HTTP answer for an error."""
    body = msgspec.json.encode(error_body(e))
    return Response(body, status_code=e.status, headers=e.headers, media_type="application/json")
