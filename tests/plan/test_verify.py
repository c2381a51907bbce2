"""A plan beside the metrics of a fleet."""

import pytest

from brigade.plan.verify import BadMetrics, histogram_quantile, samples, verify

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
            "output_tok_s_card_full_80": [80.0, 125.0],
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
