"""One rank's place in its unit: its number, the group it meets the others in, and the experts it holds.

On one host the ranks meet in shared memory. On several, all ranks meet over TCP as well, and rows go once to each host
and fan out there through its memory; straight to the rank where each host has one.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict

from brigade.comm.exchange import ExpertExchange
from brigade.comm.group import Alone, Group, PeerLost
from brigade.comm.handshake import Refused
from brigade.comm.hierarchical import HierarchicalExchange, Hosts
from brigade.comm.meeting import Stopped, listen
from brigade.comm.mesh import Mesh, patience
from brigade.comm.remote import MeshExchange
from brigade.comm.segment import FIRST_GENERATION, Segment
from brigade.comm.shared import SharedExchange, SharedGroup
from brigade.comm.wire import Wire
from brigade.core.placement import cut
from brigade.engine.messages import Form, Start
from brigade.spec.model import ModelSpec

LOAD_DEADLINE = 600.0
"""Seconds that a rank which has loaded its weights waits for the others; who watches the processes gives up sooner."""


class UnitRank:
    """Rank `rank` of `size`. Made before the weights are read; `meet` when they are, and after each loss."""

    def __init__(
        self,
        rank: int,
        size: int,
        segment: int,
        deadline: float,
        redundant: int = 0,
        network: "Network | None" = None,
    ) -> None:
        """`segment`: file number of the shared memory, -1 if there is none. `redundant`: slots of a layer beyond its
        experts. Raises ValueError."""
        self.rank, self.size, self._redundant = rank, size, redundant
        self._deadline, self._network = deadline, network
        self._first, self.n_here = network.here(rank) if network else (0, size)
        self.n_sharing = self.n_here
        """Ranks, of other units too, that share this machine's cores and memory."""
        self._shared: SharedGroup | None = None
        if segment >= 0:
            within = patience(deadline) if network else deadline
            self._shared = SharedGroup(Segment.attach(segment), rank - self._first, deadline=within)
        self._mesh: Mesh | None = None
        self.generation = 0

    @classmethod
    def of(cls, start: Start) -> "UnitRank":
        """The place that a worker was started for. Raises ValueError."""
        network = Network(start) if start.hosts else None
        c = start.config
        unit = cls(start.rank, c.ranks, start.segment, c.rank_deadline, c.redundant_experts, network)
        if start.kv is not None:
            unit.n_sharing = start.kv.n_here
        return unit

    @property
    def group(self) -> Group:
        """All ranks of the unit. Another one after each `meet`."""
        return self._mesh or self._shared or Alone()

    @property
    def one_wire(self) -> bool:
        """Whether the group and the exchange use the same connections: then one thread at a time may use either."""
        return self._network is not None

    def bounds(self, spec: ModelSpec) -> tuple[int, ...]:
        """Which slots of a layer which rank has: rank r those from bounds[r] up to bounds[r + 1]. They never change."""
        n_slots = spec.moe.n_experts + self._redundant if spec.moe else 0
        return (0, *(held.stop for held in cut(n_slots, self.size)))

    @property
    def port(self) -> int:
        """Where this rank listens for ranks of other hosts; 0 where all are on one host."""
        return self._network.port if self._network else 0

    def meet(self, form: Form) -> None:
        """Wait until all ranks have come to the new generation. Raises PeerLost, and ValueError if the others run
        something else."""
        self.generation = form.generation
        if self._mesh is not None:
            self._mesh.close()
            self._mesh = None
        if self._shared is None:
            return
        first = form.generation == FIRST_GENERATION
        try:
            self._shared.form(form.generation, LOAD_DEADLINE if first else None)
        except PeerLost as e:
            raise PeerLost(self._of_unit(e.ranks), e.why) from e
        if self._network is not None:
            self._mesh = self._network.meet(self.rank, form, self._deadline, self._culprits)

    def exchange(self, spec: ModelSpec, wire: Wire) -> ExpertExchange | None:
        """How rows reach their experts; None where all are here and nothing is rounded. Call it after `meet`."""
        if self._shared is None or spec.moe is None:
            return None
        if self._mesh is not None and self._network is not None:
            if max(self._network.sizes) == 1:  # nowhere do rows fan out: they go straight to where they are computed
                return MeshExchange(self._mesh, self.bounds(spec), spec.moe.top_k, wire)
            return HierarchicalExchange(self._mesh, self._shared, self._network.sizes, self.bounds(spec), wire)
        return SharedExchange(self._shared, self.bounds(spec), wire)

    def _culprits(self) -> Iterable[int] | None:
        """Who is to blame if the supervisor has stopped this generation; None if it has not."""
        assert self._shared is not None
        try:
            self._shared.segment.check(self.generation)
        except PeerLost as e:
            return self._of_unit(e.ranks)
        return None

    def _of_unit(self, ranks: Iterable[int]) -> list[int]:
        return [self._first + rank for rank in ranks]


class Network:
    """What a rank needs to meet those of other hosts. It listens on its host's address, on a port of its own."""

    def __init__(self, start: Start) -> None:
        """Raises ValueError if that address is not one of this machine."""
        self.sizes = start.hosts
        self._secret, self._agreed = start.secret, _agreed(start)
        try:
            self._listener = listen(start.address)
        except OSError as e:
            raise ValueError(f"rank {start.rank}: {e.strerror}; is it an address of this machine?") from e
        self.port: int = self._listener.getsockname()[1]

    def here(self, rank: int) -> tuple[int, int]:
        """First rank and number of ranks of the host that `rank` is on."""
        hosts = Hosts(self.sizes)
        return hosts.first[hosts.of(rank)], self.sizes[hosts.of(rank)]

    def meet(self, rank: int, form: Form, deadline: float, stopped: Stopped) -> Mesh:
        """All ranks, over TCP. Raises PeerLost, ValueError."""
        addresses = [(host, int(port)) for host, _, port in (a.rpartition(":") for a in form.addresses)]
        try:
            return Mesh(
                rank,
                addresses,
                self._listener.dup(),  # a meeting closes its own; this one stays for the next
                secret=self._secret,
                layout=self._agreed,
                generation=form.generation,
                deadline=deadline,
                stopped=stopped,
            )
        except Refused as e:
            raise ValueError(f"rank {rank} cannot meet the others: {e}") from e


def _agreed(start: Start) -> bytes:
    """SHA-256 over all that ranks must have in common; where the model lies and threads may differ."""
    settings = {k: v for k, v in asdict(start.config).items() if k not in ("model", "threads")}
    return hashlib.sha256(json.dumps([start.hosts, settings], sort_keys=True).encode()).digest()
