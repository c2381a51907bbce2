"""The deployment file as frozen data, read strictly from plain values: what a whole deployment is, in one place.

An unknown key, a wrong type, a missing value or an absurd number is one error that names the file, the line, the key
and what to do. What is left out stays None here: whoever uses the value derives it and says from what. Keys and secrets
are never in this file, only the names of the files that hold them. The YAML itself is read elsewhere.
"""

import difflib
import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar, cast, get_args

from brigade.spec.layout import Host, Layout, Role, cut_off, is_loopback
from brigade.spec.sizes import parse_disk, parse_size

T = TypeVar("T")
Path = tuple[str | int, ...]
"""Where a value stands: ("units", 0, "hosts", 1) is units[0].hosts[1]."""
WeightType = Literal["auto", "bf16", "int8", "int4"]
WireType = Literal["auto", "bf16", "int8", "fp8"]
Link = Literal["shared", "tcp", "nixl"]

LOCAL = "127.0.0.1"
HOST_PORT = 7000
ADMIN_PORT = 8001
BOUNDS = {
    "count": (1, 1024),
    "ranks_per_host": (1, 64),
    "redundant_experts": (0, 4096),
    "drafts": (0, 1),
    "max_running": (1, 4096),
    "max_waiting": (0, 1 << 20),
    "max_context": (1, 1 << 24),
    "max_step_tokens": (1, 1 << 20),
    "host_port": (1, 65535),
}
SIZES = {"kv_memory": (1 << 10, 1 << 50), "rank_memory": (1 << 20, 1 << 50)}
MOST_HOSTS = 4096
MOST_SIZE_CHARS, MOST_KEY_CHARS, MOST_UNIT_NAME_CHARS = 40, 60, 40
INSTEAD = {
    "api_key": "keys never stand in this file; write the key into a file and name that with 'api_key_file'",
    "admin_key": "keys never stand in this file; write the key into a file and name that with 'admin_key_file'",
    "secret": "secrets never stand in this file; write it into a file and name that with 'secret_file'",
}


class BadDeployment(ValueError):
    """A deployment file that cannot be used. The message names the file, the line, the key and what to do."""


@dataclass(frozen=True)
class Limits:
    """What one rank takes on; None: the engine's own default, or what the machine allows."""

    max_running: int | None = None
    """Requests that run in one step of a rank."""
    max_waiting: int | None = None
    """Requests that wait beyond the running ones before new ones are refused."""
    max_context: int | None = None
    """Positions of one request."""
    max_step_tokens: int | None = None
    """Tokens of one step of a rank."""
    kv_memory: int | None = None
    """Bytes of a rank's KV cache."""
    kv_disk: str | None = None
    """Folder on each host that keeps what has left this cache, and its bound, as "/mnt/nvme:200GiB"."""
    rank_deadline: float | None = None
    """Seconds that a rank waits for the others in a step before the one that is missing is replaced."""

    def over(self, wide: "Limits") -> "Limits":
        """These limits, and those of `wide` where these say nothing."""
        mine = {f.name: getattr(self, f.name) for f in fields(self)}
        return Limits(**{name: getattr(wide, name) if value is None else value for name, value in mine.items()})


@dataclass(frozen=True)
class ChangeRoles:
    """How long requests should wait, for units to change between prefill and decode by."""

    prefill_seconds: float = 2.0
    """From the moment that a decode rank has room for a prompt until a prefill rank begins to compute it."""
    decode_seconds: float = 0.5
    """Until a decode rank has room."""


@dataclass(frozen=True)
class Units:
    """Units of one role that are alike: `count` of them, on consecutive hosts."""

    role: Role
    name: str | None = None
    """What people call the unit, or the first part of it where there are several; None: the role."""
    count: int = 1
    hosts: tuple[str, ...] = (LOCAL,)
    """Addresses, unit by unit; one alone is shared by all `count` units."""
    ranks_per_host: int = 1
    redundant_experts: int = 0
    """Slots beyond one for each expert, in every layer of a unit."""
    limits: Limits = field(default_factory=Limits)
    given: frozenset[str] = frozenset()
    """Keys that the file gives."""

    def layouts(self) -> tuple[Layout, ...]:
        """Each unit's hosts and ranks."""
        each = max(1, len(self.hosts) // self.count)
        starts = [0] * self.count if len(self.hosts) == 1 else range(0, len(self.hosts), each)
        return tuple(Layout(tuple(Host(a, self.ranks_per_host) for a in self.hosts[i : i + each])) for i in starts)


@dataclass(frozen=True)
class Deployment:
    """A model, the units that serve it, and how clients and hosts reach them."""

    model: str | None = None
    """Folder of the checkpoint; None: the bundled demo model."""
    weights: WeightType = "auto"
    drafts: int = 0
    """Tokens that the checkpoint's multi-token-prediction layer guesses in each step of every unit."""
    wire: WireType = "auto"
    """How rows travel to experts in every unit: exactly, or smaller and rounded."""
    rank_memory: int | None = None
    """Bytes that one rank may take; None: what its machine has free."""
    listen: tuple[str, int] = (LOCAL, 8000)
    """Address and port for clients."""
    api_key_file: str | None = None
    admin_listen: tuple[str, int] = (LOCAL, ADMIN_PORT)
    """Address and port for orders to units, where there is an admin key."""
    admin_key_file: str | None = None
    """None: no orders are taken."""
    gateway: str | None = None
    """Address of the machine that serves clients, as the hosts reach it; None: the first host of the first unit."""
    host_port: int = HOST_PORT
    """Where the gateway listens for the hosts that join it."""
    secret_file: str | None = None
    link: Link | None = None
    """How prompts get from prefill to decode units; None: the engine's own default."""
    units: tuple[Units, ...] = (Units("mixed"),)
    limits: Limits = field(default_factory=Limits)
    change_roles: ChangeRoles | None = None
    """None: units change only when they are told to."""
    given: frozenset[str] = frozenset()

    def limits_of(self, units: Units) -> Limits:
        return units.limits.over(self.limits)

    @property
    def head(self) -> str:
        """Address of the gateway's machine, which may have ranks of any unit, or none."""
        return self.gateway or self.units[0].hosts[0]

    @property
    def hosts(self) -> tuple[str, ...]:
        """Addresses of all machines with ranks, each once."""
        return tuple(dict.fromkeys(address for units in self.units for address in units.hosts))

    @property
    def other_hosts(self) -> tuple[str, ...]:
        """Those that join the gateway."""
        return tuple(address for address in self.hosts if address != self.head)


def unit_names(d: Deployment) -> tuple[str, ...]:
    """What each unit is called, in the order of the file: decode-0, decode-1, or as `name` says."""
    out: list[str] = []
    n: dict[str, int] = {}
    for units in d.units:
        if units.name is not None and units.count == 1:
            out.append(units.name)
            continue
        base = units.name or units.role
        first = n.get(base, 0)
        n[base] = first + units.count
        out += [f"{base}-{first + i}" for i in range(units.count)]
    return tuple(out)


KEYS = tuple(f.name for f in fields(Deployment) if f.name != "given")
UNIT_KEYS = tuple(f.name for f in fields(Units) if f.name != "given")
LIMIT_KEYS = tuple(f.name for f in fields(Limits))
CHANGE_KEYS = tuple(f.name for f in fields(ChangeRoles))


def deployment_from(data: object, where: str = "deploy.yaml", line_of: Mapping[Path, int] | None = None) -> Deployment:
    """A Deployment from the plain values of a file called `where`; `line_of` says on which line a path stands.

    Raises BadDeployment.
    """
    source = _Source(where, line_of or {})
    table = _Table(data, (), KEYS, source)
    result = Deployment(
        model=table.take("model", _text, None),
        weights=cast(WeightType, table.take("weights", _one_of(WeightType), "auto")),
        drafts=table.take("drafts", _number("drafts"), 0),
        wire=cast(WireType, table.take("wire", _one_of(WireType), "auto")),
        rank_memory=table.take("rank_memory", _size("rank_memory"), None),
        listen=table.take("listen", _address_and_port, (LOCAL, 8000)),
        api_key_file=table.take("api_key_file", _text, None),
        admin_listen=table.take("admin_listen", _address_and_port, (LOCAL, ADMIN_PORT)),
        admin_key_file=table.take("admin_key_file", _text, None),
        gateway=table.take("gateway", _address, None),
        host_port=table.take("host_port", _number("host_port"), HOST_PORT),
        secret_file=table.take("secret_file", _text, None),
        link=cast(Link | None, table.take("link", _one_of(Link), None)),
        units=_all_units(table, source),
        limits=_limits(table, source),
        change_roles=_change_roles(table, source),
        given=frozenset(table.values),
    )
    _check_guards(result, source)
    _check_names(result, source)
    if result.link and sum(units.count for units in result.units) == 1:
        raise source.fault(("link",), "prompts go from one unit to another, and there is one; leave it out")
    return result


def plain(d: Deployment) -> dict[str, Any]:
    """The plain values of a file that says this: what was given, and what is not as it would be without."""
    out = _said(d, Deployment())
    for key in ("listen", "admin_listen"):
        if key in out:
            host, port = getattr(d, key)
            out[key] = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if "units" in out:
        out["units"] = [_said(u, Units(u.role), always=("role",)) for u in d.units]
    return out


def _said(
    value: Deployment | Units | Limits | ChangeRoles, default: object, always: tuple[str, ...] = ()
) -> dict[str, Any]:
    out: dict[str, Any] = {}
    given: frozenset[str] = getattr(value, "given", frozenset())
    for f in fields(value):
        v = getattr(value, f.name)
        if f.name == "given" or not (f.name in given or f.name in always or v != getattr(default, f.name)):
            continue
        inner = isinstance(v, Limits | ChangeRoles)
        out[f.name] = _said(v, type(v)()) if inner else list(v) if isinstance(v, tuple) else v
    return out


def shown(path: Path) -> str:
    """("units", 0, "hosts", 1) -> units[0].hosts[1]."""
    text = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path)
    return text.removeprefix(".")


@dataclass(frozen=True)
class _Source:
    where: str
    line_of: Mapping[Path, int]

    def fault(self, path: Path, text: str) -> BadDeployment:
        """An error at the line of `path`, or of what it is part of."""
        line = next((self.line_of[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.line_of), None)
        at = self.where if line is None else f"{self.where}:{line}"
        return BadDeployment(f"{at}: {shown(path)}: {text}" if path else f"{at}: {text}")


class _Table:
    """A mapping whose keys are all known; values are taken one by one."""

    def __init__(self, data: object, path: Path, keys: tuple[str, ...], source: _Source) -> None:
        if not isinstance(data, dict):
            what = "the file" if not path else "it"
            raise source.fault(path, f"{what} must be keys with values, like 'model: /models/mine', not {_kind(data)}")
        for key in data:
            if key not in keys:
                raise source.fault((*path, str(key)[:MOST_KEY_CHARS]), _unknown(key, keys))
        self.values: dict[str, Any] = data
        self._path, self._source = path, source

    def take(self, key: str, read: Callable[[Any], T], *default: T) -> T:
        path = (*self._path, key)
        if key not in self.values:
            if default:
                return default[0]
            raise self._source.fault(self._path, f"'{key}' is missing; add it")
        return self.read(path, self.values[key], read)

    def read(self, path: Path, value: object, read: Callable[[Any], T]) -> T:
        if value is None:
            raise self._source.fault(path, "has no value; give it one, or leave the key out")
        try:
            return read(value)
        except ValueError as e:
            raise self._source.fault(path, str(e)) from e


def _all_units(table: _Table, source: _Source) -> tuple[Units, ...]:
    if "units" not in table.values:
        return (Units("mixed"),)
    data = table.take("units", _list)
    return tuple(_units(value, ("units", i), source) for i, value in enumerate(data))


def _units(data: object, path: Path, source: _Source) -> Units:
    table = _Table(data, path, UNIT_KEYS, source)
    role = table.take("role", _one_of(Role))
    count = table.take("count", _number("count"), 1)
    hosts: tuple[str, ...] = (LOCAL,)
    if "hosts" in table.values:
        at = (*path, "hosts")
        hosts = tuple(table.read((*at, i), h, _address) for i, h in enumerate(table.take("hosts", _list)))
        _check_hosts(hosts, count, at, source)
    return Units(
        role=cast(Role, role),
        name=table.take("name", _unit_name, None),
        count=count,
        hosts=hosts,
        ranks_per_host=table.take("ranks_per_host", _number("ranks_per_host"), 1),
        redundant_experts=table.take("redundant_experts", _number("redundant_experts"), 0),
        limits=_limits(table, source, path),
        given=frozenset(table.values),
    )


def _limits(table: _Table, source: _Source, path: Path = ()) -> Limits:
    if "limits" not in table.values:
        return Limits()
    inner = _Table(table.take("limits", lambda v: v), (*path, "limits"), LIMIT_KEYS, source)
    numbers = {key: inner.take(key, _number(key), None) for key in LIMIT_KEYS if key in BOUNDS}
    return Limits(
        **numbers,
        kv_memory=inner.take("kv_memory", _size("kv_memory"), None),
        kv_disk=inner.take("kv_disk", _disk, None),
        rank_deadline=inner.take("rank_deadline", _seconds(0.1), None),
    )


def _change_roles(table: _Table, source: _Source) -> ChangeRoles | None:
    if "change_roles" not in table.values:
        return None
    inner = _Table(table.take("change_roles", lambda v: v), ("change_roles",), CHANGE_KEYS, source)
    return ChangeRoles(**{key: inner.take(key, _seconds(0.01)) for key in inner.values})


def _check_hosts(hosts: tuple[str, ...], count: int, at: Path, source: _Source) -> None:
    for i, host in enumerate(hosts):
        if host in hosts[:i]:
            raise source.fault((*at, i), f"{host} is there twice; give each host once, with more ranks_per_host")
    if len(hosts) > 1 and len(hosts) % count:
        raise source.fault(at, f"{len(hosts)} hosts cannot be shared equally by {count} units; give a multiple")
    if not hosts:
        raise source.fault(at, "is empty; name at least one host, or leave it out for this machine")


def _check_host_port(d: Deployment, source: _Source) -> None:
    """Refuse a port that hosts and others would call: it would show only after all hosts have read their weights."""
    keys = ("listen", "admin_listen") if d.admin_key_file is not None else ("listen",)
    for key in keys:
        address, port = getattr(d, key)
        if port == d.host_port and address in (d.head, "0.0.0.0", "::"):
            at = "host_port" if "host_port" in d.given else key
            other = key if at == "host_port" else "host_port"
            raise source.fault((at,), f"port {port} is that of {other!r}; give another one")


def _check_guards(d: Deployment, source: _Source) -> None:
    """Nobody may come in without proof: clients from other machines, and hosts."""
    if not is_loopback(d.listen[0]) and d.api_key_file is None:
        text = f"{d.listen[0]} can be reached by other machines, so clients need a key; name its file in 'api_key_file'"
        raise source.fault(("listen",), f"{text}, or listen on {LOCAL}")
    if "admin_listen" in d.given and d.admin_key_file is None:
        text = "orders to units are taken only with a key; write one into a file and name it in 'admin_key_file'"
        raise source.fault(("admin_listen",), text)
    if d.admin_key_file is not None and d.admin_listen[1] == d.listen[1]:
        raise source.fault(("admin_listen",), f"port {d.listen[1]} is that of 'listen'; give another one")
    if d.other_hosts:
        _check_host_port(d, source)
    for i, units in enumerate(d.units):
        at: Path = ("units", i, "hosts") if "hosts" in units.given else ("units", i)
        for address in units.hosts:
            if text := cut_off(address, d.head):
                raise source.fault(at, text)
            if address != d.head and d.secret_file is None:
                text = "hosts know each other by a secret; write one into a file and name it in 'secret_file'"
                raise source.fault(at, text)


def _check_names(d: Deployment, source: _Source) -> None:
    """Each unit has a name of its own."""
    names = unit_names(d)
    starts = [sum(u.count for u in d.units[:i]) for i in range(len(d.units))]
    for i, (units, start) in enumerate(zip(d.units, starts, strict=True)):
        taken = next((x for x in names[start : start + units.count] if names.count(x) > 1), None)
        if units.name is not None and taken is not None:
            raise source.fault(("units", i, "name"), f"another unit is called {taken}, too; choose another name")


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _unknown(key: object, keys: tuple[str, ...]) -> str:
    if key in INSTEAD:
        return INSTEAD[str(key)]
    close = difflib.get_close_matches(str(key), keys, 1)
    if not close:
        close = difflib.get_close_matches(str(key).replace("-", "_").lower(), keys, 1)
    return f"unknown key; {f'did you mean {close[0]!r}?' if close else 'known here: ' + ', '.join(keys)}"


def _kind(value: object) -> str:
    """What a value is, in the words of the file."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "keys with values"
    if isinstance(value, list):
        return "a list"
    return repr(value) if len(repr(value)) <= 60 else "a long text"


def _text(v: object) -> str:
    if not isinstance(v, str) or not v.strip():
        raise ValueError(f"must be text, not {_kind(v)}; put it in quotes")
    if "\0" in v:
        raise ValueError("must not hold a NUL character")
    try:
        v.encode()
    except UnicodeEncodeError:
        raise ValueError("must not hold half a character (a surrogate); write the whole one") from None
    return v


def _disk(v: object) -> str:
    text = _text(v)
    parse_disk(text)
    return text


def _list(v: object) -> list[Any]:
    if not isinstance(v, list):
        raise ValueError(f"must be a list (lines that begin with '- '), not {_kind(v)}")
    if not v:
        raise ValueError("is empty; give at least one, or leave the key out")
    if len(v) > MOST_HOSTS:
        raise ValueError(f"has {len(v)} entries, more than {MOST_HOSTS}")
    return v


def _one_of(kind: Any) -> Callable[[object], str]:
    names = get_args(kind)

    def read(v: object) -> str:
        if not isinstance(v, str) or v not in names:
            close = difflib.get_close_matches(str(v), names, 1)
            raise ValueError(f"must be {', '.join(names[:-1])} or {names[-1]}, not {_kind(v)}" + _guess(close))
        return v

    return read


def _guess(close: list[str]) -> str:
    return f"; did you mean {close[0]}?" if close else ""


def _number(key: str) -> Callable[[object], int]:
    low, high = BOUNDS[key]

    def read(v: object) -> int:
        if not isinstance(v, int) or isinstance(v, bool):
            raise ValueError(f"must be a whole number from {low} to {high}, not {_kind(v)}")
        if not low <= v <= high:
            raise ValueError(f"must be from {low} to {high}, not {v}")
        return v

    return read


def _seconds(least: float) -> Callable[[object], float]:
    def read(v: object) -> float:
        if not isinstance(v, (int, float)) or isinstance(v, bool) or not least <= v <= 3600:
            raise ValueError(f"must be seconds from {least} to 3600, not {_kind(v)}")
        return float(v)

    return read


def _size(key: str) -> Callable[[object], int]:
    low, high = SIZES[key]

    def read(v: object) -> int:
        if isinstance(v, bool) or not isinstance(v, (int, str)):
            raise ValueError(f"must be a size like 512MiB or 80GB, not {_kind(v)}")
        if len(str(v)) > MOST_SIZE_CHARS:
            raise ValueError(f"must be a size like 512MiB or 80GB, not {_kind(v)}")
        n = parse_size(v) if isinstance(v, str) else v
        if not low <= n <= high:
            raise ValueError(f"must be from {low} to {high} bytes, not {n}; write it like 512MiB or 80GB")
        return n

    return read


_UNIT_NAME = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?")


def _unit_name(v: object) -> str:
    if not isinstance(v, str) or len(v) > MOST_UNIT_NAME_CHARS or not _UNIT_NAME.fullmatch(v):
        what = f"must be lower-case letters, digits and single hyphens, at most {MOST_UNIT_NAME_CHARS}"
        raise ValueError(f"{what}, not {_kind(v)}")
    return v


def _address(v: object) -> str:
    """A host name or an IP address of one machine."""
    if not isinstance(v, str) or len(v) > 253:
        raise ValueError(f"must be a host name or an IP address, not {_kind(v)}")
    ip = _ip(v)
    if ip is not None and ip.is_unspecified:
        raise ValueError(f"{v} is every address of a machine; give the one that the other hosts reach")
    if ip is not None:
        return v
    if not _NAME.fullmatch(v) or re.fullmatch(r"[\d.]+", v):
        raise ValueError(f"must be a host name or an IP address without a port, not {v!r}")
    return v


def _address_and_port(v: object) -> tuple[str, int]:
    """`10.0.0.1:8000`, `[::1]:8000`, `0.0.0.0:8000` or `myhost:8000`."""
    example = "write it like 127.0.0.1:8000"
    if not isinstance(v, str):
        raise ValueError(f"must be an address and a port, not {_kind(v)}; {example}")
    host, _, port = v.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not port.isascii() or not port.isdigit() or not host or (":" in host and not bracketed):
        raise ValueError(f"must be an address and a port, not {_kind(v)}; {example}")
    if int(port) > 65535:
        raise ValueError(f"port must be from 0 to 65535, not {port}")
    host = host[1:-1] if bracketed else host
    if host not in ("0.0.0.0", "::"):
        _address(host)
    return host, int(port)
