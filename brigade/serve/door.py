"""Who may come in: checks the Host header and the API key of every request before any route sees it."""

import hmac
import ipaddress
import re
from functools import lru_cache

from starlette.types import Scope

from brigade.serve.config import ServeConfig
from brigade.serve.errors import ApiError

OPEN_PATHS = frozenset({"/health"})
"""Load balancers and process supervisors ask here and have no key."""


class Door:
    """Lets requests through or refuses them."""

    def __init__(self, config: ServeConfig) -> None:
        self._key = None if config.api_key is None else config.api_key.encode()
        self._hosts = frozenset({"localhost", config.host.lower()}) if config.checks_host else None

    def check(self, scope: Scope) -> None:
        """Raises ApiError 401 or 403."""
        if scope["path"] in OPEN_PATHS:
            return
        if self._hosts is not None and not _names(_header(scope, b"host"), self._hosts):
            raise ApiError(
                403,
                "the Host header does not name this machine; without an API key the server answers only to localhost "
                "(set --api-key to serve under another name)",
                code="host_not_allowed",
            )
        if self._key is not None and not _has_key(_header(scope, b"authorization"), self._key):
            raise ApiError(
                401,
                "missing or wrong API key; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _header(scope: Scope, name: bytes) -> bytes:
    """The first header of this name; empty if there is none."""
    return next((value for key, value in scope["headers"] if key == name), b"")


def _has_key(header: bytes, key: bytes) -> bool:
    scheme, _, given = header.partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), key)


_HOST = re.compile(r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[^:\[\]]+))(?::\d{1,5})?")


@lru_cache(256)
def _names(header: bytes, hosts: frozenset[str]) -> bool:
    found = _HOST.fullmatch(header.decode("latin-1").strip().lower())
    if found is None:
        return False
    host = found["v6"] or found["name"]
    return host in hosts or _is_loopback(host)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
