"""Who may come in: checks the Host header and the API key of every request before any route sees it."""

import hmac
import ipaddress
import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from brigade.serve.config import ServeConfig
from brigade.serve.errors import ApiError, error_response

OPEN_PATHS = frozenset({"/health"})
"""Load balancers and process supervisors ask here and have no key."""


class Door:
    """ASGI middleware. Lets a request through or answers 401 or 403."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self._app = app
        self._key = None if config.api_key is None else config.api_key.encode()
        self._hosts = {"localhost", config.host.lower()} if config.checks_host else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await error_response(refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        if scope["path"] in OPEN_PATHS:
            return None
        headers = Headers(scope=scope)
        if self._hosts is not None and not _names(headers.get("host", ""), self._hosts):
            return ApiError(
                403,
                "the Host header does not name this machine; without an API key the server answers only to localhost "
                "(set --api-key to serve under another name)",
                code="host_not_allowed",
            )
        if self._key is not None and not _has_key(headers.get("authorization", ""), self._key):
            return ApiError(
                401,
                "missing or wrong API key; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return None


def _has_key(header: str, key: bytes) -> bool:
    scheme, _, given = header.partition(" ")
    # Starlette decodes headers as latin-1, so encoding so gives the bytes that were sent.
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), key)


_HOST = re.compile(r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[^:\[\]]+))(?::\d{1,5})?")


def _names(header: str, hosts: set[str]) -> bool:
    found = _HOST.fullmatch(header.strip().lower())
    if found is None:
        return False
    host = found["v6"] or found["name"]
    return host in hosts or _is_loopback(host)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
