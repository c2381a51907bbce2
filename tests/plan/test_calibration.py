"""The committed calibration: it is what the script writes, and it keeps the ratios that were measured."""

import json
from copy import deepcopy
from importlib import resources

import pytest

from brigade.plan.calibrate import far_from, quantile, shrunk
from brigade.plan.case import BadPoints
from brigade.plan.fit import cholesky_solve, problem, residual, solve_step
from brigade.plan.points import cases_of, kept_aside, not_predicted, shipped_points, shipped_rows
from brigade.plan.rates import PRIOR_SD, shipped
from brigade.plan.reproduce import compare, fleet, ratios

DATA = json.loads((resources.files("brigade.plan") / "data/calibration.json").read_text(encoding="utf-8"))
C = shipped()


def test_the_residuals_in_the_file_are_those_of_its_rates() -> None:
    cases = shipped_points() + shipped_rows()
    assert len(cases) == len(DATA["residuals"])
    for case, line in zip(cases, DATA["residuals"], strict=True):
        assert (case.name, case.metric) == (line["case"], line["metric"])
        assert residual(case, C) == pytest.approx(line["fitted"], abs=0.02)


def test_the_check_compares_every_number_of_the_file() -> None:
    assert far_from(DATA, DATA) == []
    for path in (("rates", "memory"), ("factors", "sglang"), ("spread", "decode/engine"), ("residuals", 7, "engine"),
                 ("summary", "wide-EP decode", "fitted")):  # fmt: skip
        other = deepcopy(DATA)
        at = other
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] += 0.03
        assert far_from(DATA, other) == [".".join(map(str, path))]
    assert far_from(DATA, {**DATA, "residuals": DATA["residuals"][1:]}) == ["residuals"]


def test_no_rate_is_further_from_its_prior_than_four_standard_deviations() -> None:
    from math import log

    from brigade.plan.rates import Rates

    for name, sd in PRIOR_SD.items():
        assert abs(log(getattr(C.rates, name) / getattr(Rates(), name))) < 4 * sd, name


@pytest.mark.parametrize("line", ratios(C), ids=lambda x: x.name)
def test_the_seven_ratios_are_within_ten_percent(line) -> None:  # type: ignore[no-untyped-def]
    assert line.predicted == pytest.approx(line.measured, rel=0.1)


@pytest.mark.parametrize("line", compare(kept_aside(), C), ids=lambda x: x.name)
def test_points_that_no_version_was_fitted_to_are_inside_their_interval(line) -> None:  # type: ignore[no-untyped-def]
    assert line.inside


def test_points_that_are_not_predicted_are_named() -> None:
    assert "mlperf-gb300" in not_predicted()
    assert not set(not_predicted()) & {case.name for case in shipped_points()}


def test_the_fleet_closes_with_published_rates() -> None:
    lines = {x.what: x for x in fleet(C) if "published" in x.name}
    assert lines["nodes on average"].predicted == pytest.approx(226.75, rel=1e-3)
    assert lines["dollars a day"].predicted == pytest.approx(87_072, rel=1e-3)


def test_nearly_every_row_is_answered() -> None:
    assert len(shipped_rows()) == 2 * 339


def test_intervals_widen_as_less_is_known() -> None:
    for phase in "prefill", "decode", "ttft":
        widths = [C.spread[f"{phase}/{k}"] for k in ("engine+hardware", "engine", "nothing")]
        assert widths == sorted(widths)


def test_least_squares_against_a_case_by_hand() -> None:
    assert cholesky_solve([[4.0, 2.0], [2.0, 3.0]], [2.0, 1.0]) == pytest.approx([0.5, 0.0])


def test_a_mean_of_few_is_pulled_to_zero() -> None:
    assert 0 < shrunk([0.3]) < 0.3
    assert shrunk([0.3] * 50) == pytest.approx(0.3, rel=0.01)
    assert quantile([1, 2, 3, 4, 5, 6, 7, 8, 9], 0.8) == 8


def test_a_point_that_lacks_something_is_named() -> None:
    with pytest.raises(BadPoints, match="point 'x' lacks or misstates 'measured'"):
        list(cases_of({"id": "x"}, "mine.json"))


def test_a_step_of_the_fit_starts_at_the_priors() -> None:
    p = problem(shipped_points()[:1])
    from brigade.plan.fit import Linear

    x = solve_step(p, Linear([0.0] * len(p.names), [0.0], [{}]), [0])
    assert x == pytest.approx([0.0] * len(p.names))
