"""Where the server listens and how patient it is. Frozen; checked once before any socket opens."""

import ipaddress
import socket
from dataclasses import dataclass, field

MIN_KEY_CHARS = 8


class ConfigError(ValueError):
    """Settings the server cannot start with. The message says which, why, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much a client may send and how long it may take. Not settings for users: tests shorten them."""

    body_bytes: int = 4 << 20
    body_seconds: float = 30.0
    """Time for a whole request body to arrive."""
    all_bodies_bytes: int = 256 << 20
    """Bytes of bodies held at one time, all connections together."""
    head_bytes: int = 64 << 10
    """Request line and headers."""
    head_seconds: float = 30.0
    """Time for a request's headers to arrive, and how long an idle connection is kept."""
    write_seconds: float = 60.0
    """How long a client may stop reading its answer before the connection is cut."""
    exit_seconds: float = 5.0
    """Time for the last bytes to reach clients once generation has ended at shutdown."""


ADMIN_PORT = 8001


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminConfig:
    """Where orders to units are taken. There is no such place without a key."""

    key: str = field(repr=False)
    host: str = "127.0.0.1"
    port: int = ADMIN_PORT


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """One HTTP server in front of one engine. `check` must pass before it starts."""

    served_name: str
    """The model name that requests must give."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes any free port; the announced address has the real one."""
    api_key: str | None = field(default=None, repr=False)
    drain_seconds: float = 30.0
    """At shutdown, how long running requests may go on."""
    limits: Limits = Limits()
    admin: AdminConfig | None = None
    """None: no orders are taken."""

    def check(self) -> None:
        """Raise ConfigError unless these settings are safe to serve with. Resolves the host name."""
        if not self.served_name:
            raise ConfigError("the served model name is empty")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be between 0 and 65535, not {self.port}")
        if not 0 <= self.drain_seconds <= 86400:
            raise ConfigError(f"drain_seconds must be between 0 and 86400, not {self.drain_seconds}")
        if self.api_key is not None:
            _check_key(self.api_key)
        self.addresses()
        if self.admin is not None:
            self._check_admin(self.admin)

    def _check_admin(self, admin: AdminConfig) -> None:
        _check_key(admin.key)
        if admin.key == self.api_key:
            raise ConfigError("the admin key is the clients' key, so every client could stop units; make another one")
        if not 0 <= admin.port <= 65535:
            raise ConfigError(f"the admin port must be between 0 and 65535, not {admin.port}")
        if admin.port and admin.port == self.port:
            raise ConfigError(f"port {admin.port} is for clients and for orders at once; give orders another one")
        resolve(admin.host)

    def addresses(self) -> list[str]:
        """The IP addresses of `host`, in the resolver's order. Raises ConfigError if it has none, or if one is not
        loopback and there is no API key."""
        found = resolve(self.host)
        exposed = [address for address in found if not _is_loopback(address)]
        if exposed and self.api_key is None:
            what = self.host if self.host in exposed else f"{self.host} ({exposed[0]})"
            raise ConfigError(
                f"refusing to listen on {what} without an API key: anyone who can reach this machine could use the "
                f"model; set --api-key, or listen on 127.0.0.1"
            )
        return found

    @property
    def checks_host(self) -> bool:
        """Whether requests must name this machine in their Host header. Without a key, loopback is the only guard, and
        a web page can get behind it by giving its own name a loopback address (DNS rebinding)."""
        return self.api_key is None


def resolve(host: str) -> list[str]:
    """IP addresses of a host name or address. Raises ConfigError if there is none."""
    if not host:
        raise ConfigError("host is empty; use 127.0.0.1 for this machine only, or 0.0.0.0 for every network")
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as e:
        raise ConfigError(f"host {host!r} cannot be resolved ({e}); give an IP address or a known name") from e
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _check_key(key: str) -> None:
    if len(key) < MIN_KEY_CHARS:
        raise ConfigError(
            f"the API key has {len(key)} characters; use at least {MIN_KEY_CHARS} so it cannot be guessed"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError("the API key may hold only printable ASCII characters without spaces (HTTP headers carry it)")
