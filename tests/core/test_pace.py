"""When a client that was turned away should come back: later the slower requests end, and the more came before it."""

from brigade.core.pace import LONGEST, SHORTEST, UNKNOWN, Pace


def ending_every(seconds: float, n: int = 50) -> Pace:
    pace = Pace()
    for i in range(n):
        pace.ended(i * seconds)
    return pace


def test_before_requests_have_ended_a_fixed_time_is_told() -> None:
    assert Pace().turn_away(0.0) == UNKNOWN


def test_those_who_are_turned_away_are_told_different_times() -> None:
    pace = ending_every(2.0)
    assert [round(pace.turn_away(98.0)) for _ in range(4)] == [2, 4, 6, 8]


def test_a_place_that_becomes_free_is_that_of_the_first_who_waits() -> None:
    pace = ending_every(2.0)
    for _ in range(4):
        pace.turn_away(98.0)
    for i in range(3):
        pace.ended(100.0 + 2 * i)
    assert round(pace.turn_away(104.0)) == 4


def test_when_nothing_ends_any_more_times_grow() -> None:
    pace = ending_every(2.0, 10)
    assert pace.turn_away(18.0) < 3
    assert Pace(pace._ends).turn_away(118.0) > 10


def test_what_is_told_is_within_bounds() -> None:
    quick, slow = ending_every(0.001), ending_every(1000.0)
    assert quick.turn_away(0.05) == SHORTEST
    assert slow.turn_away(50_000.0) == LONGEST
