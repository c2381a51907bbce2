"""Spans one after another: nothing while nobody records, the newest ones when there are too many."""

from brigade.core.laps import Laps


class Clock:
    """Ten nanoseconds pass at each look."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        self.now += 10
        return self.now


def test_a_part_ends_where_the_next_one_begins() -> None:
    laps = Laps(Clock())
    laps.record()
    laps.end("attention", 3)
    laps.end("experts", 3, lane=1)
    laps.begin()
    laps.end("head")
    assert laps.take() == ([("attention", 10, 20, 3, 0), ("experts", 20, 30, 3, 1), ("head", 40, 50, -1, 0)], 0)


def test_while_nobody_records_no_clock_is_read_and_nothing_is_kept() -> None:
    clock = Clock()
    laps = Laps(clock)
    laps.begin()
    laps.end("attention")
    laps.note("transfer", 1, 2)
    assert clock.now == 0
    assert laps.take() == ([], 0)


def test_the_oldest_spans_make_room_and_are_counted() -> None:
    laps = Laps(Clock())
    laps.record(most=2)
    for name in "abcde":
        laps.end(name)
    kept, n_lost = laps.take()
    assert ([name for name, *_ in kept], n_lost) == (["d", "e"], 3)
    laps.end("f")
    assert laps.take() == ([], 0), "it was stopped"
