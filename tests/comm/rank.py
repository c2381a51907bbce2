"""A rank as a process for tests: JSON commands on stdin, one JSON answer each on stdout."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed import FileStore

from brigade.comm.distributed import DistributedExchange, DistributedGroup
from brigade.comm.exchange import ExpertExchange
from brigade.comm.group import Alone, Group, PeerLost
from brigade.comm.hierarchical import HierarchicalExchange
from brigade.comm.meeting import listen
from brigade.comm.mesh import Mesh
from brigade.comm.remote import MeshExchange
from brigade.comm.segment import Segment
from brigade.comm.shared import SharedExchange, SharedGroup
from brigade.comm.wire import wire
from tests.comm.oracle import Case, experts

torch.set_num_threads(1)


class Rank:
    def __init__(self) -> None:
        self.segments: dict[int, Segment] = {}
        self.group: Group = Alone()
        self.local: SharedGroup | None = None
        self.hosts: list[int] = []

    def answer(self, command: dict[str, Any]) -> Any:
        kind = command.pop("do")
        return getattr(self, kind)(**command)

    def hello(self) -> str:
        return "ready"

    def open(self, backend: str, rank: int, size: int, deadline: float, **at: Any) -> str:
        if not isinstance(self.group, SharedGroup):
            self.group.close()
        if backend == "shared":
            segment = self.segments.get(at["fd"]) or self.segments.setdefault(at["fd"], Segment.attach(at["fd"]))
            group = SharedGroup(segment, rank, deadline=deadline)
            group.form(at["generation"])
            self.group = group
            self.hosts = []
        elif backend == "distributed":
            self.hosts = []
            store = FileStore(at["path"], -1)
            self.group = DistributedGroup(store, at["prefix"], rank, size, deadline=deadline)
        else:
            self.hosts = at.get("hosts", [])
            if self.hosts:
                segment = self.segments.get(at["fd"]) or self.segments.setdefault(at["fd"], Segment.attach(at["fd"]))
                self.local = SharedGroup(segment, at["local"], deadline=0.75 * deadline)
                self.local.form(at["generation"])
            addresses = [tuple(a) for a in at["addresses"]]
            secret, layout = at.get("secret", "s" * 16).encode(), at.get("layout", "l" * 32).encode()
            self.group = Mesh(
                rank,
                addresses,
                self.listener,
                secret=secret,
                layout=layout,
                generation=1,
                deadline=deadline,
            )
        return "open"

    def listen(self) -> list[Any]:
        self.listener = listen("127.0.0.1")
        return list(self.listener.getsockname())

    def form(self, generation: int) -> str:
        assert isinstance(self.group, SharedGroup)
        self.group.form(generation)
        return "formed"

    def exchange(self, case: Case) -> ExpertExchange:
        way = wire(case.wire, case.width, getattr(torch, case.dtype))  # type: ignore[arg-type]
        if isinstance(self.group, SharedGroup):
            return SharedExchange(self.group, case.bounds, way)
        if self.hosts:
            assert isinstance(self.group, Mesh)
            assert self.local
            return HierarchicalExchange(self.group, self.local, self.hosts, case.bounds, way)
        if isinstance(self.group, Mesh):
            return MeshExchange(self.group, case.bounds, case.k, way)
        assert isinstance(self.group, DistributedGroup)
        return DistributedExchange(self.group, case.bounds, case.k, way)

    def share(self, ints: list[int]) -> list[tuple[int, ...]]:
        return self.group.share(ints)

    def run(self, cases: list[dict[str, Any]], overlap: bool = False) -> str:
        """All cases, one after the other or two by two in both lanes. They share bounds, width, k and dtype."""
        all_cases = [Case(**c) for c in cases]
        exchange = self.exchange(all_cases[0])
        step = 2 if overlap else 1
        for i in range(0, len(all_cases), step):
            pair = all_cases[i : i + step]
            for lane, case in enumerate(pair):
                exchange.start_dispatch(lane, *case.inputs(self.group.rank))
            for lane, case in enumerate(pair):
                self.compute(exchange, lane, case)
            for lane, case in enumerate(pair):
                same(exchange.finish_combine(lane), case.results(self.group.rank), "results")
        return "equal"

    def compute(self, exchange: ExpertExchange, lane: int, case: Case) -> None:
        rows_ND, slot_N = exchange.finish_dispatch(lane)
        want_ND, want_N = case.rows(self.group.rank)
        same(slot_N, want_N, "slots")
        same(rows_ND, want_ND, "rows")
        exchange.start_combine(lane, experts(rows_ND, slot_N, case.bounds[self.group.rank]))

    def until_lost(self, case: dict[str, Any], started: str = "") -> dict[str, Any]:
        """Exchanges until a peer is lost: who it was and how long the last call took."""
        c = Case(**case)
        exchange = self.exchange(c)
        x_TD, slots_TK = c.inputs(self.group.rank)
        while True:
            start = time.monotonic()
            try:
                exchange.start_dispatch(0, x_TD, slots_TK)
                self.compute(exchange, 0, c)
                exchange.finish_combine(0)
            except PeerLost as e:
                return {"lost": e.ranks, "seconds": time.monotonic() - start, "text": str(e)}
            if started:
                Path(started).touch()

    def close(self) -> str:
        self.group.close()
        return "closed"


def same(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    assert got.dtype == want.dtype, f"{what}: {got.dtype}, not {want.dtype}"
    assert torch.equal(got, want), f"{what}: {list(got.shape)} differ from {list(want.shape)}"


def main() -> None:
    rank = Rank()
    for line in sys.stdin:
        try:
            answer = {"ok": rank.answer(json.loads(line))}
        except PeerLost as e:
            answer = {"lost": e.ranks, "text": str(e)}
        except (AssertionError, ValueError, RuntimeError, OSError) as e:
            answer = {"error": f"{type(e).__name__}: {e}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
