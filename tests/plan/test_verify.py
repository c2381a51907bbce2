"""A plan beside the metrics of a fleet."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
from typer.testing import CliRunner

from brigade.cli import app
from brigade.plan.ask import answer
from brigade.plan.models import find_model
from brigade.plan.plain import as_data
from brigade.plan.quantity import servers
from brigade.plan.question import Question
from brigade.plan.rates import shipped
from brigade.plan.units import Slo
from brigade.plan.verify import BadMetrics, histogram_quantile, samples, verify
from brigade.spec.work import FP8

METRICS = """
# TYPE brigade_time_per_output_token_seconds histogram
brigade_time_per_output_token_seconds_bucket{le="0.02"} 10
brigade_time_per_output_token_seconds_bucket{le="0.04"} 90
brigade_time_per_output_token_seconds_bucket{le="+Inf"} 100
brigade_time_to_first_token_seconds_bucket{le="1"} 50
brigade_time_to_first_token_seconds_bucket{le="2"} 100
brigade_time_to_first_token_seconds_bucket{le="+Inf"} 100
brigade_prompt_tokens_total 1000
brigade_cached_prompt_tokens_total 300
"""
PLAN = {
    "question": {"hit_rate": 0.56},
    "options": [
        {
            "tpot_factor_80": 1.25,
            "ttft_factor_80": 2.4,
            "tpot_s": {"p50": 0.03, "p90": 0.035},
            "ttft_s": {"p50": 0.1, "p90": 1.9},
        }
    ],
}


def test_quantiles_are_those_of_prometheus() -> None:
    found = samples(METRICS)
    assert histogram_quantile(found, "brigade_time_per_output_token_seconds", 0.5) == pytest.approx(0.03)
    assert histogram_quantile(found, "brigade_time_to_first_token_seconds", 0.5) == pytest.approx(1.0)
    assert histogram_quantile(found, "brigade_time_per_output_token_seconds", 0.99) == 0.04  # the last finite edge


def test_each_prediction_is_inside_its_interval_or_not() -> None:
    lines = {x.what: x.inside for x in verify(PLAN, METRICS)}
    assert lines["time per token p50, s"]
    assert not lines["time to first token p50, s"]
    assert lines["time to first token p90, s"]
    assert not lines["prefix cache hit rate"]


@pytest.mark.parametrize(("plan", "metrics", "says"), [({}, METRICS, "lacks"), (PLAN, "", "no observation")])
def test_what_is_missing_is_named(plan: dict, metrics: str, says: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(BadMetrics, match=says):
        verify(plan, metrics)


@pytest.mark.parametrize("wrong", [None, "x", -1, 0, float("nan"), float("inf"), True, [], {}])
@pytest.mark.parametrize("key", ["tpot_factor_80", "ttft_factor_80", "tpot_s", "ttft_s"])
def test_a_damaged_plan_is_one_line_that_names_the_place(key: str, wrong: object) -> None:
    plan = deepcopy(PLAN)
    plan["options"][0][key] = wrong  # type: ignore[index]
    with pytest.raises(BadMetrics, match=f"options.0.{key}"):
        verify(plan, METRICS)


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, "[1]", "null"])
def test_a_file_that_is_no_plan_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    result = CliRunner().invoke(app, ["verify", "--plan", str(path), "--metrics", "http://127.0.0.1:9/metrics"])
    assert result.exit_code == 2
    assert len(result.output.strip().splitlines()) == 1


def test_a_real_plan_has_intervals_of_both_times() -> None:
    q = Question(find_model("deepseek-v3"), servers("2 x 8 x H200"), 40, 4000, 1000, 0.56, Slo(0.05, 2.0), FP8, "fp8")
    plan = json.loads(json.dumps(as_data(answer(q, shipped()), shipped())))
    lines = verify(plan, METRICS)
    assert len(lines) == 5
    first, token = lines[2], lines[0]
    assert first.high / first.predicted > token.high / token.predicted > 1.1  # times to first token are known less well
