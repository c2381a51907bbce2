"""Whether ranks are well: steps where there is something to run, answers where there is not."""

from types import SimpleNamespace

import pytest

from brigade.engine import pulse
from brigade.engine.config import EngineConfig
from brigade.engine.messages import Pong, Stats, Step
from brigade.engine.pulse import Pulse

IDLE, WORKING = Stats(3, 0, 0, 0, 0), Stats(3, 1, 0, 4, 0)


class Clock:
    now = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pulse, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def begun() -> Pulse:
    p = Pulse(EngineConfig())
    p.begin()
    return p


def test_a_unit_that_works_and_makes_no_steps_is_not_well_although_it_answers(clock: Clock) -> None:
    p = begun()
    p.hear(0, Step([], WORKING))
    for _ in range(11):
        clock.now += 1
        p.hear(0, Pong(1, WORKING))
    assert p.problem(busy=True) == "no step was finished for 11 s"
    p.hear(0, Step([], WORKING))
    assert p.problem(busy=True) == ""


def test_one_that_waits_for_prompts_from_elsewhere_is_well_while_it_answers(clock: Clock) -> None:
    p = begun()
    for _ in range(60):
        clock.now += 1
        p.hear(0, Pong(1, IDLE))
    assert p.problem(busy=True) == ""
    clock.now += 9
    assert p.problem(busy=True) == "", "its first step may take that long"
    assert p.problem(busy=False) == "the worker has not answered for 9 s"
    clock.now += 2
    assert p.problem(busy=True) == "the worker has not answered for 11 s"


def test_what_begins_after_a_rest_has_time_for_its_first_step(clock: Clock) -> None:
    p = begun()
    clock.now += 60
    p.hear(0, Pong(1, WORKING))
    assert p.problem(busy=True) == ""
