"""Layouts beyond one kind of box: pipelines, two kinds of servers, units that sleep at night, what Brigade runs."""

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from brigade.cli import app
from brigade.plan.arrivals import read_trace
from brigade.plan.ask import answer
from brigade.plan.models import find_model
from brigade.plan.night import night_of
from brigade.plan.plots import Plot
from brigade.plan.quantity import servers
from brigade.plan.question import Answer, Question
from brigade.plan.rates import Rates, shipped
from brigade.plan.reasons import crossover, crossover_curve
from brigade.plan.search import search
from brigade.plan.serving import Pool, Workload, occupied, prefill_time
from brigade.plan.step import Setup, decode_step
from brigade.plan.units import Slo
from brigade.spec.deploy import deployment_from
from brigade.spec.device import find_device
from brigade.spec.work import FP8, PRECISIONS, Grid

C = shipped()
F = find_model("deepseek-v3").facts(FP8)
H800 = find_device("H800")


def ask(fleet: str, users: int, tpot: float = 0.05) -> Answer:
    q = Question(
        find_model("deepseek-v3"), servers(fleet), users, 4000, 1000, 0.56, Slo(tpot, 2.0), PRECISIONS["fp8"], "fp8",
        engine="sglang", smaller=False,
    )  # fmt: skip
    return answer(q, C)


def test_prefill_on_one_kind_of_servers_and_decode_on_the_other() -> None:
    a = ask("3 x 8 x H200 + 4 x 8 x H20", 200)
    over_two = next(o for o in a.options if o.family == "two kinds")
    nodes = {u.pool.device.name: u.nodes * k for u, k in over_two.layout.units}
    assert set(nodes) == {"H200", "H20"}
    assert nodes["H200"] <= 3
    assert nodes["H20"] <= 4
    assert "H20" in str(over_two.name)
    assert "H200" in str(over_two.name)


@pytest.mark.parametrize("fleet", ["8 x 8 x H200 + 2 x 8 x H20", "3 x 8 x H200", "9 x 8 x H800"])
def test_what_is_said_to_be_served_keeps_its_promise_when_it_is(fleet: str) -> None:
    """Also where prefill units bind: then fewer requests decode, faster, and prompts come more often."""
    for o in ask(fleet, 100_000).options:
        assert o.ttft[1] <= 2.0 * 1.05, o.name
        assert o.tpot[1] <= 0.05 * 1.05, o.name
        assert o.served.load <= 0.8, o.name


def test_a_pipeline_passes_through_all_layers_and_its_groups_take_turns() -> None:
    stage, pipe = Grid(8, 8, 8, 1), Grid(16, 8, 8, 1, pp=2)
    alone = decode_step(F, stage, H800, Rates(), 16, 4096)
    piped = decode_step(F, pipe, H800, Rates(), 32, 4096)
    assert alone.seconds < piped.seconds < 1.1 * alone.seconds
    assert {t.name for t in piped.terms} - {t.name for t in alone.terms} == {"stages"}


@pytest.mark.parametrize(
    ("model", "fleet"),
    [("deepseek-v3", "8 x 8 x H200"), ("gpt-oss-120b", "8 x 8 x H200"), ("gpt-oss-120b", "8 x 8 x B200")],
)
def test_what_is_said_of_the_turning_point_holds_at_every_number_of_users(model: str, fleet: str) -> None:
    m = find_model(model)
    w = Workload(100, 4000, 1000)
    found = search(m.facts(PRECISIONS[m.stored]), servers(fleet)[0], "", C, w, Slo(0.05, 2.0), m.spec.n_mtp > 0)
    said = str(crossover(found))
    numbers = [int(x.replace(",", "")) for x in re.findall(r"(?:below|above) ([\d,]*\d)", said)]
    below, above = numbers if len(numbers) == 2 else numbers * 2 if numbers else (10**9, 10**9)
    for users, row in crossover_curve(found):
        boxes, cluster = row.get("boxes", 10**6), row.get("cluster", 10**6)
        if users <= below:
            assert boxes <= cluster, said
        elif users > above and "sometimes the cluster" not in said and (boxes, cluster) != (10**6, 10**6):
            assert cluster < boxes, said


def test_pipeline_stages_work_on_chunks_at_once() -> None:
    one, four = (Pool(F, Grid(8 * n, 8, 8, 1, pp=n), H800, Setup()) for n in (1, 4))
    w = Workload(1, 131_072, 1)
    whole, _ = prefill_time(one, C, w)
    shared, _ = prefill_time(four, C, w)
    assert whole / 4 < shared < whole / 2
    assert occupied(four, shared, w) < shared
    short = Workload(1, 2048, 1)
    assert prefill_time(four, C, short)[0] >= prefill_time(one, C, short)[0]


def test_a_pipeline_is_recommended_only_where_nothing_else_keeps_the_promise() -> None:
    a = ask("6 x 8 x H200", 800)
    assert a.recommended is not None
    assert a.recommended.family != "pipeline"
    assert any(o.family == "pipeline" for o in a.options)


def test_at_night_whole_units_sleep_and_the_rest_serves_all_who_are_there() -> None:
    o = ask("22 x 8 x H800", 6000).options[0]
    for share in 0.1, 0.4, 0.9:
        awake = night_of(o.layout, share * o.users)
        assert awake.users >= share * o.users
        assert awake.nodes <= o.layout.nodes
        assert [u for u, _ in awake.units] == [u for u, _ in o.layout.units]
        assert all(left <= k for (_, left), (_, k) in zip(awake.units, o.layout.units, strict=True))


def run(*args: str):  # type: ignore[no-untyped-def]
    return CliRunner().invoke(app, ["plan", *args], env={"COLUMNS": "120"})


def test_kinds_whose_prices_are_not_all_known_are_compared_by_cards() -> None:
    text = " ".join(run("--servers", "4 x 8 x H200 + 4 x 8 x H20", "--users", "60").output.split())
    assert "cards are counted instead" in text


def test_the_file_that_is_written_is_of_an_option_that_brigade_runs(tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    result = run("--servers", "8 x 8 x H200", "--users", "60", "--engine", "sglang", "--out", str(path))
    assert result.exit_code == 0, result.output
    deployment = deployment_from(yaml.safe_load(path.read_text()))
    text = path.read_text().splitlines()[0]
    assert "TP" not in text
    assert "PP" not in text
    assert deployment.units


def test_what_is_assumed_is_what_is_counted(tmp_path: Path) -> None:
    def assumed(*args: str) -> list[str]:
        result = run("--users", "1", "--tpot", "1s", "--ttft", "60s", *args, "--json")
        assert result.exit_code == 0, result.output
        found: list[str] = json.loads(result.output)["assumptions"]
        return found

    host = assumed("--servers", "1 x 1 x Xeon-6980P", "--model", "r1-distill-qwen-7b")
    assert any("10 % of memory and 1 GB kept free" in x for x in host)
    card = assumed("--servers", "1 x 8 x H200", "--model", "r1-distill-qwen-7b")
    assert any("10 % of memory and 6 GB kept free" in x for x in card)
    sizes = {"hidden_size": 1024, "num_attention_heads": 8, "num_hidden_layers": 8, "vocab_size": 32000}
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["X"], "intermediate_size": 4096, **sizes}))
    own = assumed("--servers", "1 x 8 x H200", "--model", str(tmp_path))
    assert any("read for its sizes alone" in x for x in own)


def test_an_axis_has_no_exponents() -> None:
    marks = re.findall(r'text-anchor="(?:end|middle)">([^<]*)<', Plot(9000.0, 2e6, "users", "tokens").svg())
    assert "10,000" in marks
    assert not [x for x in marks if "e+" in x]


def test_what_brigade_cannot_run_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    dense = ("--model", "r1-distill-llama-70b", "--servers", "1 x 8 x L40S", "--tpot", "300ms", "--ttft", "20s")
    result = run(*dense, "--users", "1", "--out", str(path))
    assert result.exit_code == 2
    assert "nothing that it runs" in result.output
    assert not path.exists()


def test_json_has_every_term_with_its_formula_and_source() -> None:
    data = json.loads(run("--servers", "4 x 8 x H200", "--users", "60", "--json").output)
    terms = data["terms_of_first_option"]
    assert {"formula", "source", "value", "name", "part"} == set(terms[0])
    assert all(x["source"] for x in terms)
    assert all(x["formula"] for x in terms if not x["part"].startswith("device"))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--engine", "sglnag"), "nobody measured it; the nearest is sglang (measured: "),
        (("--engine", "vultr inference cookbook"), "nobody measured it"),
        (("--price", "abc"), "--price abc: must be a positive number of dollars"),
        (("--night-hours", "25"), "at most 24"),
        (("--input", "160k", "--output", "64k"), "has a context of 163,840; the nearest is --output"),
        (("--users", "9" * 40), "--users"),
        (("--model", "a" * 3000), "is not known"),
        (("--lang", "fr"), "must be en or zh"),
        (("--loads", "none.json"), "--loads none.json: cannot be read"),
        (("--device", "none.yaml"), "--device none.yaml: cannot be read"),
        (("--calibrate", "none.json"), "none.json: cannot be read"),
    ],
)
def test_wrong_words_get_one_line(args: tuple[str, ...], says: str) -> None:
    result = run("--servers", "4 x 8 x H200", "--users", "60", *args)
    assert result.exit_code == 2, result.output
    assert len(result.output.strip().splitlines()) == 1
    assert says in result.output


@pytest.mark.parametrize(
    ("layers", "experts", "says"),
    [
        (100, 256, "has 100 layers, and deepseek-v3 has 62"),
        (4000, 256, "is longer than 62 layers"),
        (2, 7, "256 counts"),
    ],
)
def test_loads_of_another_size_are_one_line(layers: int, experts: int, says: str, tmp_path: Path) -> None:
    path = tmp_path / "loads.json"
    path.write_text(json.dumps([[1] * experts] * layers))
    result = run("--servers", "4 x 8 x H200", "--users", "60", "--loads", str(path))
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("rate", "says"), [("100000", "are not simulated, the nearest is --rate"), ("nan", "requests per second")]
)
def test_a_rate_that_no_option_could_serve_is_not_simulated(rate: str, says: str, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(run("--servers", "1 x 8 x H200", "--users", "40", "--json").output)
    result = run("simulate", str(plan), "--trace", "shipped", "--rate", rate)
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("point", "says"),
    [
        (5, "must be keys with values"),
        ({"id": "x", "measured": {"tpot_ms": -1}, "workload": {}}, "lacks or misstates"),
        ({"id": "x", "model": "deepseek-v3", "hardware": {"gpu": "H900", "count": 8}, "parallelism": {"TP": 8},
          "workload": {"isl": 1, "concurrency": 1}, "measured": {"tpot_ms": 1}}, "H900"),
    ],
)  # fmt: skip
def test_a_bad_measurement_is_named(point: object, says: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"points": [point]}))
    result = run("reproduce", "--points", str(path))
    assert result.exit_code == 2, result.output
    assert says in " ".join(result.output.split())


def test_the_shipped_trace_is_sorted_and_begins_at_nought() -> None:
    times = [a.at for a in read_trace(None)]
    assert times == sorted(times)
    assert times[0] == 0
