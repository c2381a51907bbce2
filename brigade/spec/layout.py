"""Where the ranks of a unit run. Rank numbers go through the hosts in order."""

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations
from typing import Literal

Role = Literal["mixed", "prefill", "decode"]
"""What the ranks of a unit do: compute prompts, decode what others have computed, or both."""


@dataclass(frozen=True)
class Host:
    """One machine of a unit."""

    address: str
    """That its ranks listen on and the other hosts reach: a name or an IP address."""
    n_ranks: int


@dataclass(frozen=True)
class Layout:
    """Ranks by host: host h has ranks `first(h)` up to `first(h + 1)`. Raises ValueError for a host without ranks or
    named twice."""

    hosts: tuple[Host, ...]

    def __post_init__(self) -> None:
        if not self.hosts:
            raise ValueError("a unit needs at least one host")
        for i, host in enumerate(self.hosts):
            if host.n_ranks < 1:
                raise ValueError(f"host {host.address} needs at least one rank, not {host.n_ranks}")
            if host.address in [h.address for h in self.hosts[:i]]:
                raise ValueError(f"host {host.address} is there twice; give it more ranks")

    @property
    def n_ranks(self) -> int:
        return self.first(len(self.hosts))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Ranks of each host."""
        return tuple(h.n_ranks for h in self.hosts)

    @property
    def n_nodes(self) -> int:
        """Nodes that experts are placed by: the hosts if all have the same number of ranks, else one."""
        return len(self.hosts) if len(set(self.sizes)) == 1 else 1

    def first(self, host: int) -> int:
        """The host's first rank."""
        return (0, *accumulate(self.sizes))[host]

    def ranks(self, host: int) -> range:
        return range(self.first(host), self.first(host + 1))

    def host_of(self, rank: int) -> int:
        if not 0 <= rank < self.n_ranks:
            raise ValueError(f"rank must be 0 to {self.n_ranks - 1}, not {rank}")
        return next(h for h in range(len(self.hosts)) if rank in self.ranks(h))


def on_one_host(n_ranks: int) -> Layout:
    return Layout((Host("127.0.0.1", n_ranks),))


def n_sharing(layouts: Iterable[Layout], address: str) -> int:
    """How many ranks of these units share the machine that has an address. All of the loopback is one machine."""

    def here(other: str) -> bool:
        return other == address or (is_loopback(other) and is_loopback(address))

    return sum(host.n_ranks for layout in layouts for host in layout.hosts if here(host.address))


def links(layouts: Sequence[Layout]) -> tuple[str, ...]:
    """How prompts get from ranks of one unit to those of another: "shared" through memory where the two have a host in
    common, "tcp" where they have not."""
    hosts = [{host.address for host in layout.hosts} for layout in layouts]
    pairs = {("shared" if a == b else "tcp") for one, other in combinations(hosts, 2) for a in one for b in other}
    return tuple(sorted(pairs))


def is_loopback(address: str) -> bool:
    """Whether an address means only the machine that uses it."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def cut_off(a: str, b: str) -> str:
    """Why one of two hosts cannot reach the other, where their addresses tell; empty: they may."""
    if is_loopback(a) == is_loopback(b):
        return ""
    here, there = (a, b) if is_loopback(a) else (b, a)
    return f"{here} is this machine only, and {there} cannot reach it; give all hosts addresses"
