"""Which unit of a fleet may stop doing what it does, and when one should change: never the last, never in a hurry."""

import random
from dataclasses import replace

import pytest

from brigade.core.roles import SIDES, Change, Duty, Policy, Side, Targets, last_of

BOTH = SIDES["mixed"]


def units(prefill: int = 1, decode: int = 1, mixed: int = 0) -> list[Duty]:
    roles = [("prefill", prefill), ("decode", decode), ("mixed", mixed)]
    return [Duty(f"{role}-{i}", role, role) for role, n in roles for i in range(n)]  # type: ignore[arg-type]


def waits(prefill: float = 0.0, decode: float = 0.0) -> dict[Side, float]:
    return {"prefill": prefill, "decode": decode}


# Who may stop --------------------------------------------------------------------------------------------------------


def test_the_last_unit_of_a_side_may_not_stop() -> None:
    assert last_of(units(1, 2), "prefill-0", SIDES["prefill"]) == "prefill-0 is the last unit that computes prompts"
    assert last_of(units(1, 2), "decode-1", SIDES["decode"]) == ""
    assert last_of(units(0, 0, 1), "mixed-0", BOTH) == "mixed-0 is the last unit that computes prompts"


def test_a_mixed_unit_takes_over_from_either() -> None:
    assert last_of(units(1, 1, 1), "prefill-0", SIDES["prefill"]) == ""
    assert last_of(units(1, 1, 1), "decode-0", SIDES["decode"]) == ""
    assert last_of(units(1, 1, 1), "mixed-0", BOTH) == ""


@pytest.mark.parametrize(
    "change", [{"up": False}, {"drained": True}, {"role": "prefill"}, {"next_role": "prefill"}], ids=str
)
def test_one_that_is_lost_or_stops_itself_takes_over_from_nobody(change: dict[str, object]) -> None:
    fleet = units(1, 2)
    fleet[1] = replace(fleet[1], **change)  # type: ignore[arg-type]
    assert last_of(fleet, "decode-1", SIDES["decode"]).startswith("decode-1 is the last unit that decodes")


def test_who_would_take_over_if_it_were_up_is_named() -> None:
    fleet = [replace(u, up=u.name != "decode-0") for u in units(1, 2)]
    assert last_of(fleet, "decode-1", SIDES["decode"]).endswith("; decode-0 would, but is not up")


def test_a_unit_that_changes_takes_what_both_roles_have_in_common() -> None:
    assert Duty("a", "mixed", "prefill").sides == {"prefill"}
    assert Duty("a", "prefill", "decode").sides == set()
    assert Duty("a", "decode", "mixed").sides == {"decode"}
    assert Duty("a", "mixed", "mixed", drained=True).sides == set()


# When one should change ----------------------------------------------------------------------------------------------


TARGETS = Targets(prefill_seconds=2, decode_seconds=1, slack=0.5, looks=3, rest=4)


def changes(policy: Policy, fleet: list[Duty], *seen: dict[Side, float]) -> list[Change | None]:
    return [policy.look(w, fleet) for w in seen]


def test_a_side_that_is_short_for_long_enough_gets_the_least_busy_unit_of_the_other() -> None:
    fleet = [replace(u, n_requests=n) for u, n in zip(units(1, 3), (0, 5, 2, 9), strict=True)]
    got = changes(Policy(TARGETS), fleet, *[waits(prefill=3, decode=0.4)] * 3)
    assert got[:2] == [None, None]
    assert got[2] == Change("decode-1", "prefill", "requests wait 3.00 s for prefill, 0.40 s for decode")
    got = changes(Policy(TARGETS), units(2, 1), *[waits(prefill=0.9, decode=1.5)] * 3)
    assert got[2] is not None
    assert (got[2].name, got[2].role) == ("prefill-0", "decode")


def test_one_look_that_says_otherwise_begins_the_count_anew() -> None:
    short = waits(prefill=3)
    assert changes(Policy(TARGETS), units(1, 2), short, short, waits(), short, short) == [None] * 5


@pytest.mark.parametrize("wait", [waits(1.9, 0.4), waits(3, 0.6), waits(9, 9), waits(0.9, 0.9), waits()])
def test_between_the_target_and_the_slack_nothing_changes(wait: dict[Side, float]) -> None:
    assert changes(Policy(TARGETS), units(2, 2), *[wait] * 10) == [None] * 10


def test_after_a_change_its_effect_is_waited_for() -> None:
    policy, short = Policy(TARGETS), waits(prefill=3)
    got = changes(policy, units(1, 4), *[short] * 9)
    assert [i for i, change in enumerate(got) if change] == [2, 7]


def test_nothing_changes_while_a_unit_is_still_changing() -> None:
    fleet = units(1, 3)
    fleet[1] = replace(fleet[1], next_role="prefill")
    assert changes(Policy(TARGETS), fleet, *[waits(prefill=3)] * 9) == [None] * 9


def test_mixed_units_stay_mixed() -> None:
    assert changes(Policy(TARGETS), units(1, 0, 3), *[waits(prefill=3)] * 9) == [None] * 9


@pytest.mark.parametrize("seed", range(10))
def test_the_last_unit_of_a_role_never_changes_whatever_happens(seed: int) -> None:
    rng = random.Random(seed)
    fleet = units(rng.randint(1, 3), rng.randint(1, 3), rng.randint(0, 1))
    policy = Policy(replace(TARGETS, looks=1, rest=0))
    for _ in range(200):
        fleet = [
            replace(u, up=rng.random() > 0.2, drained=rng.random() < 0.1, n_requests=rng.randrange(9)) for u in fleet
        ]
        change = policy.look(waits(rng.random() * 4, rng.random() * 2), fleet)
        if change is None:
            continue
        chosen = next(u for u in fleet if u.name == change.name)
        assert chosen.role != "mixed"
        left = [u for u in fleet if u.up and not u.drained and u is not chosen]
        assert any(u.role in (chosen.role, "mixed") for u in left)
        fleet = [replace(u, role=change.role, next_role=change.role) if u is chosen else u for u in fleet]


@pytest.mark.parametrize(("name", "value"), [("prefill_seconds", 0), ("slack", 1.5), ("looks", 0), ("rest", -1)])
def test_targets_that_cannot_be_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be between"):
        Targets(**{name: value})  # type: ignore[arg-type]
