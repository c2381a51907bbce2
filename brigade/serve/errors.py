"""How the server says no: OpenAI's error shape for everything. Decides nothing about what is an error."""

import math
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

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


def install(app: FastAPI) -> None:
    """Make every failed answer of `app` an OpenAI error, those of the router included."""

    async def ours(_: Request, e: Exception) -> Response:
        assert isinstance(e, ApiError)
        return error_response(e)

    async def engines(_: Request, e: Exception) -> Response:
        assert isinstance(e, EngineError)
        return error_response(api_error(e))

    async def routers(request: Request, e: Exception) -> Response:
        assert isinstance(e, HTTPException)
        message = str(e.detail)
        if e.status_code == 404:
            message = f"there is nothing at {request.url.path}; the API is under /v1 (see /openapi.json)"
        if e.status_code == 405:
            message = f"{request.url.path} does not take {request.method} requests"
        return error_response(ApiError(e.status_code, message, headers=dict(e.headers or {})))

    async def invalid(_: Request, e: Exception) -> Response:
        return error_response(ApiError(400, str(e)))

    async def left(_: Request, e: Exception) -> Response:
        # Nobody reads this; 499 is what nginx calls it.
        return Response(status_code=499)

    async def unforeseen(_: Request, e: Exception) -> Response:
        # The exception goes on to the server's log; clients learn no more than that it is not their fault.
        return error_response(ApiError(500, "the server failed on this request; its log says why"))

    app.add_exception_handler(ApiError, ours)
    app.add_exception_handler(EngineError, engines)
    app.add_exception_handler(HTTPException, routers)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(ClientGone, left)
    app.add_exception_handler(Exception, unforeseen)
