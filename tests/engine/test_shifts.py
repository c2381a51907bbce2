"""Units change their roles by how long requests wait, where that is switched on."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from brigade.core.handover import State
from brigade.core.roles import Targets
from brigade.engine import shifts
from brigade.engine.shifts import Waits, shift
from tests.engine.asking import until
from tests.serve.fake_crew import fake_crew

QUICK = Targets(prefill_seconds=0.2, decode_seconds=0.2, looks=2, rest=3)


def flight(state: State, seconds: float) -> Any:
    return SimpleNamespace(state=state, since=time.monotonic() - seconds)


def test_waits_are_those_that_are_over_and_those_that_are_not() -> None:
    waits = Waits()
    for state, seconds in (State.ROUTED, 1.0), (State.ROUTED, 3.0), (State.DECODING, 90.0), (State.PREFILLING, 0.5):
        waits.left(state, seconds)
    seen = waits.look([flight(State.ROUTED, 5.0), flight(State.QUEUED, 9.0)])
    assert (round(seen["decode"], 1), seen["prefill"]) == (3.0, 0.5)
    assert waits.look([]) == {"prefill": 0.0, "decode": 0.0}


async def test_a_unit_helps_where_requests_wait_and_the_last_one_never_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shifts, "LOOK_EVERY", 0.01)
    crew = fake_crew("prefill", "decode", "decode")
    flights = [flight(State.PREFILLING, 5.0)]
    shifting = asyncio.create_task(shift(crew, Waits(), flights, QUICK))
    try:
        assert await until(lambda: [m.role for m in crew.members].count("prefill") == 2, 2)
        await asyncio.sleep(0.2)
        assert [m.role for m in crew.members].count("decode") == 1
        flights[:] = [flight(State.ROUTED, 5.0)]
        assert await until(lambda: [m.role for m in crew.members].count("decode") == 2, 2)
    finally:
        shifting.cancel()
