"""What ranks agree on: run together, sleep together, never one without the others."""

import random

import pytest

from brigade.core.lockstep import Agreed, Shape, agree

IDLE = Shape(0, False, 3)


@pytest.mark.parametrize(
    ("shapes", "agreed"),
    [
        ([IDLE], Agreed(run=False, sleep=True)),
        ([IDLE, IDLE], Agreed(run=False, sleep=True)),
        ([Shape(5, True, 3)], Agreed(run=True, sleep=False)),
        ([IDLE, Shape(1, True, 3)], Agreed(run=True, sleep=False)),
        ([IDLE, Shape(0, True, 3)], Agreed(run=False, sleep=False)),
        ([IDLE, Shape(0, False, 4)], Agreed(run=False, sleep=False)),
    ],
    ids=["one idle", "all idle", "one runs", "one of two runs", "a step is unfinished", "a wake call is on its way"],
)
def test_what_is_agreed(shapes: list[Shape], agreed: Agreed) -> None:
    assert agree(shapes) == agreed


@pytest.mark.parametrize(
    ("staged", "portion"),
    [((0, 0), 0), ((3, 0), 0), ((3, 3), 3), ((3, -3), -3), ((-3, 0), 0), ((3, 2), 0)],
    ids=[
        "nothing moves",
        "one still reads",
        "all have read",
        "one could not",
        "one could not, one reads",
        "an old one",
    ],
)
def test_experts_move_when_all_ranks_have_read_them_or_none_does(staged: tuple[int, ...], portion: int) -> None:
    agreed = agree([IDLE._replace(staged=s) for s in staged])
    assert (agreed.portion, agreed.run, agreed.sleep) == (portion, False, True)


def test_no_order_of_arriving_wake_calls_leaves_a_rank_asleep_while_another_waits_for_it() -> None:
    """Each rank hears each call in its own time. Ranks that are awake meet; all are awake until all have heard all."""
    rng = random.Random(4)
    for _ in range(300):
        n = rng.randint(1, 4)
        unheard = [list(range(1, 6)) for _ in range(n)]
        heard, work, asleep = [0] * n, [0] * n, [True] * n
        owner = [rng.randrange(n) for _ in range(6)]
        for _ in range(400):
            for rank in range(n):
                if unheard[rank] and rng.random() < 0.3:
                    heard[rank] = unheard[rank].pop(0)
                    asleep[rank] = False
                    work[rank] += 2 * (owner[heard[rank]] == rank)
            if any(asleep):  # the others wait for it in their collective
                continue
            agreed = agree([Shape(min(w, 1), w > 0, h) for w, h in zip(work, heard, strict=True)])
            assert agreed.run == any(work)
            work = [max(w - 1, 0) for w in work]
            asleep = [agreed.sleep] * n
        assert not any(map(len, unheard))
        assert all(asleep)
        assert not any(work)
