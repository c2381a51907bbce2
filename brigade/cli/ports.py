"""Who talks to whom in a deployment, over what, and what guards it. Opens nothing."""

from dataclasses import dataclass

from brigade.spec.deploy import LOCAL, Deployment
from brigade.spec.layout import is_loopback, links

SECRET = "the secret of secret_file"


@dataclass(frozen=True)
class Port:
    """A port that is listened on."""

    where: str
    port: str
    who: str
    guard: str


def is_fleet(d: Deployment) -> bool:
    """Whether there are several units."""
    return sum(u.count for u in d.units) > 1


def kv_link(d: Deployment) -> tuple[str, str]:
    """How prompts get from one unit to another, and why: decided for each two ranks by their hosts."""
    if d.link in ("tcp", "nixl"):
        return d.link.upper(), "as the file says"
    match links([layout for u in d.units for layout in u.layouts()]):
        case ("shared",):
            return "shared memory", "all ranks are on one host"
        case ("tcp",):
            return "TCP", "no host has ranks of two units"
    return "shared memory and TCP", "memory where both ranks are on one host, TCP where they are not"


def ports(d: Deployment) -> tuple[Port, ...]:
    """Those for clients first."""
    address, port = d.listen
    guard = "the key of api_key_file" if d.api_key_file else "none, but only as localhost"
    who = "this machine" if is_loopback(address) else "whoever reaches this address"
    out = [Port(address, str(port), f"clients: {who}", guard)]
    if d.admin_key_file:
        address, port = d.admin_listen
        who = "this machine" if is_loopback(address) else "whoever reaches this address"
        out.append(Port(address, str(port), f"orders to units: {who}", "the key of admin_key_file"))
    if d.other_hosts:
        out.append(Port(d.head, str(d.host_port), f"the other hosts ({len(d.other_hosts)})", SECRET))
    out += _between_ranks(d)
    if is_fleet(d):
        out += _for_kv(d)
    return tuple(out)


def _between_ranks(d: Deployment) -> list[Port]:
    """Of units with several hosts: their ranks meet."""
    layouts = [layout for units in d.units for layout in units.layouts() if len(layout.hosts) > 1]
    return [
        Port(host.address, _free(host.n_ranks), "ranks of the unit's other hosts", SECRET)
        for layout in layouts
        for host in layout.hosts
    ]


def _for_kv(d: Deployment) -> list[Port]:
    """Ranks are called by those of other units, which fetch prompts."""
    hosts = [host for u in d.units for layout in u.layouts() for host in layout.hosts]
    guard = "a secret that each host derives from that one" if d.other_hosts else "a secret of this start"
    who = "ranks of other units"
    out = [Port(host.address if d.other_hosts else LOCAL, _free(host.n_ranks), who, guard) for host in hosts]
    if d.link == "nixl":
        guard = "none: keep the network your own"
        every = dict.fromkeys(f"{host.address} and its others" for host in hosts)
        out += [Port(where, "NIXL's own", "ranks that speak NIXL", guard) for where in every]
    return out


def _free(n: int) -> str:
    return "1 free one" if n == 1 else f"{n} free ones"
