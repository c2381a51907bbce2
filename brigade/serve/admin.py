"""The admin address: orders to units, for operators. A server of its own, so that clients' routes never lead here.

    GET  /admin/units                  all units and what they do
    POST /admin/units/NAME/drain       {"restart": false, "force": false}: no new work; started again when it is empty
    POST /admin/units/NAME/undrain     {}: takes work again
    POST /admin/units/NAME/role        {"role": "decode", "force": false}

Every request needs the admin key, whose file the deployment names. An order is answered at once with what the unit does
now; what is still to come shows in GET /admin/units.
"""

import asyncio
import hmac
import re
from typing import TYPE_CHECKING

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from brigade.core.roles import UnitState
from brigade.engine.output import EngineError
from brigade.serve.config import AdminConfig
from brigade.serve.errors import ApiError, api_error, error_response
from brigade.spec.layout import Role

if TYPE_CHECKING:
    from brigade.engine.crew import Crew

MOST_BYTES, BODY_SECONDS = 4096, 10.0
"""Of an order's body, and how long it may take to arrive."""
_ORDER = re.compile(r"/admin/units/([^/]+)/(drain|undrain|role)")


class Drain(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    restart: bool = False
    force: bool = False


class Undrain(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class SetRole(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Role
    force: bool = False


class Units(msgspec.Struct, frozen=True):
    """The answer to every request: all units, or the one that an order is about."""

    units: list[UnitState]


_BODIES: dict[str, type[Drain] | type[Undrain] | type[SetRole]] = {"drain": Drain, "undrain": Undrain, "role": SetRole}


class AdminApp:
    """An ASGI application over the units of a running fleet."""

    def __init__(self, crew: "Crew", config: AdminConfig) -> None:
        self._crew, self._key = crew, config.key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        try:
            told = await self._answer(scope, receive)
            response = Response(msgspec.json.encode(Units(told)), media_type="application/json")
        except ApiError as e:
            response = error_response(e)
        except EngineError as e:
            response = error_response(api_error(e))
        await response(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive) -> list[UnitState]:
        if scope["type"] != "http":
            raise ValueError(f"the admin address speaks HTTP only, not {scope['type']}")
        self._check_key(dict(scope["headers"]).get(b"authorization", b""))
        path, method = scope["path"], scope["method"]
        if path == "/admin/units":
            _check_method(path, method, "GET")
            return [member.told for member in self._crew.members]
        if (order := _ORDER.fullmatch(path)) is None:
            raise ApiError(404, f"there is nothing at {path}; there is /admin/units")
        _check_method(path, method, "POST")
        return [self._obey(order[1], _parsed(await _body(receive), order[2]))]

    def _obey(self, name: str, order: Drain | Undrain | SetRole) -> UnitState:
        match order:
            case Drain(restart, force):
                return self._crew.drain(name, force, restart)
            case Undrain():
                return self._crew.undrain(name)
            case SetRole(role, force):
                return self._crew.set_role(name, role, force)

    def _check_key(self, header: bytes) -> None:
        scheme, _, given = header.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
            raise ApiError(
                401,
                "missing or wrong admin key; send the header Authorization: Bearer KEY",
                code="invalid_admin_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _check_method(path: str, method: str, takes: str) -> None:
    if method != takes:
        raise ApiError(405, f"{path} takes {takes}, not {method}", headers={"Allow": takes})


def _parsed(body: bytes, order: str) -> Drain | Undrain | SetRole:
    """What a body orders; an empty one is {}. Raises ApiError."""
    try:
        return msgspec.json.decode(body or b"{}", type=_BODIES[order])
    except msgspec.MsgspecError as e:
        raise ApiError(400, f"the body of an order to {order}: {e}") from e


async def _body(receive: Receive) -> bytes:
    """Raises ApiError for one that is too long or comes too slowly."""
    body, more = b"", True
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while more:
                message = await receive()
                body += message.get("body", b"")
                more = message.get("more_body", False)  # also of http.disconnect: nobody reads the answer then
                if len(body) > MOST_BYTES:
                    raise ApiError(413, f"the body is larger than {MOST_BYTES} bytes")
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s") from None
    return body
