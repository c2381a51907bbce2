"""Layouts in simulated time: the real scheduler on the planner's step times, beside the planner's formulas."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from brigade.cli import app
from brigade.plan.arrivals import BadTrace, Users, at_rate, means, read_trace
from brigade.plan.ask import answer, serve
from brigade.plan.compared import beside, simulate_trace, simulate_users
from brigade.plan.models import find_model
from brigade.plan.quantity import servers
from brigade.plan.question import Option, Question
from brigade.plan.rates import shipped
from brigade.plan.serving import Workload
from brigade.plan.simulate import Overload
from brigade.plan.units import Slo
from brigade.spec.work import PRECISIONS

C = shipped()


def option(fleet: str, users: int, hit: float = 0.0, family: str = "") -> Option:
    q = Question(
        find_model("deepseek-v3"), servers(fleet), users, 4000, 1000, hit, Slo(0.05, 2.0), PRECISIONS["fp8"], "fp8",
        engine="sglang", smaller=False,
    )  # fmt: skip
    return next(o for o in answer(q, C).options if family in (o.family, ""))


BOX = option("2 x 8 x H200", 60)
CLUSTER = option("4 x 8 x H200", 160, family="cluster")


@pytest.mark.parametrize(("o", "tpot"), [(BOX, 0.20), (CLUSTER, 0.12)], ids=["box", "cluster"])
def test_with_equal_lengths_the_formulas_say_what_the_scheduler_does(o: Option, tpot: float) -> None:
    """Times per token closely; times to first token from above, because engines add delays of their own."""
    users = Users(int(o.users), 4000, 500, over=10, vary=0.1)
    found = simulate_users(o.layout, C, users, 50, seed=3)
    lines = {x.what: x.error for x in beside(serve(o.layout, C, Workload(users.n, 4000, 500)), found)}
    assert abs(lines["TPOT p50"]) < tpot
    assert abs(lines["TPOT p90"]) < tpot
    assert -0.1 < lines["TTFT p50"] < 2
    assert found.in_flight == pytest.approx(users.n, rel=0.25)


def test_equal_seeds_give_equal_runs() -> None:
    users = Users(20, 4000, 200, over=5, vary=0.2)
    runs = [simulate_users(BOX.layout, C, users, 30, seed) for seed in (1, 1, 2)]
    times = [[x.ttft for x in run.requests] for run in runs]
    assert times[0] == times[1] != times[2]


def test_a_prefix_that_is_repeated_is_found_in_the_cache() -> None:
    found = simulate_users(BOX.layout, C, Users(30, 4096, 100, hit=0.5, over=5), 60, seed=1)
    assert found.hit == pytest.approx(0.5, abs=0.06)


def test_the_shipped_trace_runs_at_a_rate() -> None:
    trace = read_trace(None)
    assert len(trace) == 1000
    arrivals = at_rate(trace, 0.5, 120)
    assert len(arrivals) == pytest.approx(60, abs=15)
    found = simulate_trace(BOX.layout, C, arrivals, 120, seed=1)
    assert found.rate == pytest.approx(0.5, rel=0.5)
    assert 0 < found.hit < 1


def test_a_trace_that_cannot_be_served_says_so() -> None:
    with pytest.raises(Overload, match=r"only \d+ requests were answered"):
        simulate_trace(BOX.layout, C, at_rate(read_trace(None), 0.1, 10), 10, seed=1)


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n2023-11-16 18:15:50.68,396,109\n"
SERVEGEN = "timestamp_s,request_id,input_tokens,output_tokens,reason_ratio\n3.0,0,255,635,0.8\n1.0,1,209,491,0.7\n"


@pytest.mark.parametrize(("text", "lengths", "span"), [(AZURE, 385.0, 4.0), (SERVEGEN, 232.0, 2.0)])
def test_public_traces_are_read(text: str, lengths: float, span: float, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    trace = read_trace(path)
    assert means(trace)["n_in"] == lengths
    assert (trace[0].at, trace[-1].at) == (0.0, span)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("a,b\n1,2\n", "neither JSON lines nor a CSV"),
        ('{"timestamp": 1}\n', "line 1: not a request"),
        ('{"timestamp": 1, "input_length": -4, "output_length": 1}\n', "out of bounds"),
        (AZURE + "yesterday,1,1\n", "line 4: not a request"),
    ],
)
def test_a_bad_trace_is_named_with_its_line(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(BadTrace, match=says):
        read_trace(path)


def test_the_command_reads_a_plan_and_shows_both(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    asked = ["plan", "--servers", "1 x 8 x H200", "--users", "20", "--engine", "sglang", "--output", "200", "--json"]
    plan.write_text(CliRunner().invoke(app, asked).output)
    result = CliRunner().invoke(app, ["plan", "simulate", str(plan), "--seconds", "30", "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.output)
    assert {x["what"] for x in data["as planned"]} >= {"TTFT p50", "TTFT p99", "TPOT p90"}
    bad = CliRunner().invoke(app, ["plan", "simulate", str(tmp_path / "none.json")])
    assert bad.exit_code == 2
    assert len(bad.output.strip().splitlines()) == 1
