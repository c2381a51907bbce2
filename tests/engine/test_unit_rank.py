"""A rank's place in its unit: over which way rows reach their experts."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate

import pytest
import torch

from brigade.comm.hierarchical import HierarchicalExchange
from brigade.comm.remote import MeshExchange
from brigade.comm.segment import FIRST_GENERATION, Segment
from brigade.comm.shared import SharedExchange
from brigade.comm.wire import wire
from brigade.engine.config import DEMO_MODEL, EngineConfig
from brigade.engine.messages import Form, Start
from brigade.engine.unit_rank import UnitRank
from brigade.spec.config import read_spec

SPEC = read_spec(DEMO_MODEL)


@contextmanager
def met(sizes: Sequence[int]) -> Iterator[list[UnitRank]]:
    """Ranks on so many hosts, each host with a memory of its own, which have met; all in this process."""
    assert SPEC.moe is not None
    config, units = EngineConfig(ranks=sum(sizes), max_running=8, max_step_tokens=8), list[UnitRank]()
    several = list(sizes) if len(sizes) > 1 else []
    with ExitStack() as stack:
        for first, n in zip(accumulate(sizes, initial=0), sizes, strict=False):
            segment = Segment.create(n, 8 * sum(sizes), SPEC.dim, SPEC.moe.top_k)
            stack.callback(segment.close)
            for rank in range(first, first + n):
                where = {"hosts": several, "address": "127.0.0.1", "secret": bytes(16)} if several else {}
                units.append(UnitRank.of(Start(config, rank, os.dup(segment.fd), **where)))  # type: ignore[arg-type]
        form = Form(FIRST_GENERATION, [f"127.0.0.1:{unit.port}" for unit in units] if several else [])
        threads = [threading.Thread(target=unit.meet, args=(form,)) for unit in units]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        yield units
        for unit in units:
            for group in {unit.group, unit._shared}:
                group.close()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [((2,), SharedExchange), ((1, 1, 1), MeshExchange), ((1, 2), HierarchicalExchange)],
    ids=["one host", "one rank on each host", "several on one of the hosts"],
)
def test_rows_go_straight_to_ranks_that_are_alone_on_their_hosts(sizes: tuple[int, ...], kind: type) -> None:
    with met(sizes) as units:
        assert {type(unit.exchange(SPEC, wire("auto", SPEC.dim, torch.bfloat16))) for unit in units} == {kind}
