"""`brigade explain`: every shipped example is explained, numbers are the engine's, and it says what is wrong."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from brigade.cli import explained
from brigade.cli.deployed import Deployed
from brigade.engine.auto import Machine
from brigade.engine.config import EngineConfig
from brigade.spec.config import read_spec
from brigade.spec.deploy import deployment_from
from tests.cli.test_command_line import invoke

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
GIB = 1 << 30


def explain(data: dict[str, Any], machine: Machine | None = None) -> explained.Explained:
    deployed = Deployed(ROOT / "examples/x.yaml", deployment_from(data))
    return explained.explain(deployed, read_spec(deployed.model), machine or Machine(4, 16 * GIB))


def as_json(file: Path) -> dict[str, Any]:
    code, out, err = invoke("explain", str(file), "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f.stem)
def test_every_example_is_explained(file: Path) -> None:
    code, out, err = invoke("explain", str(file))
    assert (code, err) == (0, "")
    assert "memory of a rank" in out
    assert as_json(file)["units"]


def test_there_are_examples() -> None:
    assert {f.stem for f in EXAMPLES} == {
        "one_box",
        "prefill_decode",
        "two_hosts",
        "deepseek_22_nodes",
        "twin_of_22_nodes",
    }


def test_the_reference_deployment_has_the_published_shape() -> None:
    prefill, decode = as_json(ROOT / "examples/deepseek_22_nodes.yaml")["units"]
    assert (len(prefill["hosts"]), len(prefill["ranks"])) == (4, 32)
    assert (len(decode["hosts"]), len(decode["ranks"])) == (18, 144)
    assert {len(r["experts"]) for r in prefill["ranks"]} == {9}
    assert {len(r["experts"]) for r in decode["ranks"]} == {2}
    for unit in prefill, decode:
        assert {e for r in unit["ranks"] for e in r["experts"]} == set(range(256))
        assert unit["memory"]["verdict"].startswith("fits")
        assert unit["memory"]["total"] < 80 * 10**9


def test_the_reference_deployment_and_its_twin_have_the_same_parts_and_are_not_refused() -> None:
    for name in "deepseek_22_nodes", "twin_of_22_nodes":
        found = as_json(ROOT / f"examples/{name}.yaml")
        values = {v["key"]: v["value"] for v in found["values"]}
        first, last = found["units"][0]["hosts"][0], found["units"][1]["hosts"][-1]
        assert [u["role"] for u in found["units"]] == ["prefill", "decode"]
        assert (values["gateway"], values["KV transfer"]) == (first, "TCP")
        ports = {(p["where"], p["who"].split(" (")[0]) for p in found["ports"]}
        assert (first, "the other hosts") in ports
        assert (first, "ranks of other units") in ports
        assert (last, "ranks of the unit's other hosts") in ports
        assert not any("refuses" in note or "units" in note for note in found["notes"])


def test_experts_of_two_ranks_as_the_engine_spreads_them() -> None:
    ranks = as_json(ROOT / "examples/one_box.yaml")["units"][0]["ranks"]
    assert [r["experts"] for r in ranks] == [list(range(16)), list(range(16, 32))]
    assert [(r["rank"], r["host"], r["local_rank"]) for r in ranks] == [(0, "127.0.0.1", 0), (1, "127.0.0.1", 1)]


def test_ranks_go_through_the_hosts() -> None:
    ranks = as_json(ROOT / "examples/two_hosts.yaml")["units"][0]["ranks"]
    assert [(r["host"], r["local_rank"]) for r in ranks] == [
        *(("10.0.0.1", 0), ("10.0.0.1", 1), ("10.0.0.2", 0), ("10.0.0.2", 1)),
    ]


def test_what_is_left_out_is_the_engines_default_and_says_so() -> None:
    values = {v.key: v for v in explain({}).units[0].values}
    assert values["max_running"].value == f"{EngineConfig().max_running} each rank"
    assert values["max_running"].why == "not given: the engine's default"
    given = {v.key: v for v in explain({"limits": {"max_running": 7}}).units[0].values}
    assert (given["max_running"].value, given["max_running"].why) == ("7 each rank", "as the file says")


def test_the_cache_takes_a_quarter_of_what_weights_leave() -> None:
    memory = explain({"rank_memory": "100MB", "limits": {"max_running": 500}}).units[0].memory
    page = 16 * 4 * 80 * 2
    assert memory.kv_cache == (100_000_000 - sum(memory.weights.values())) // 4 // page * page
    assert memory.kv_token == 4 * 80 * 2


def test_memory_that_is_too_small_is_said() -> None:
    assert "weights alone need" in explain({"rank_memory": "2MiB"}).units[0].memory.verdict
    too_much = explain({"rank_memory": "32MiB", "limits": {"kv_memory": "64MiB"}}).units[0].memory
    assert too_much.verdict.startswith("does not fit: ")
    here = explain({"units": [{"role": "mixed", "ranks_per_host": 2}]}, Machine(2, 40 << 20)).units[0].memory
    assert here.available == 20 << 20
    assert here.verdict.startswith("fits")


def test_other_machines_are_not_judged_by_this_one() -> None:
    memory = as_json(ROOT / "examples/two_hosts.yaml")["units"][0]["memory"]
    assert memory["kv_cache"] is None
    assert memory["verdict"].startswith("not checked: give rank_memory")


def test_ports_and_who_may_use_them() -> None:
    ports = {
        (p["where"], p["port"]): (p["who"], p["guard"]) for p in as_json(ROOT / "examples/two_hosts.yaml")["ports"]
    }
    assert ports[("0.0.0.0", "8000")] == ("clients: whoever reaches this address", "the key of api_key_file")
    assert ports[("10.0.0.1", "7000")] == ("the other hosts (1)", "the secret of secret_file")
    assert ports[("10.0.0.2", "2 free ones")][1] == "the secret of secret_file"
    assert [p.port for p in explain({}).ports] == ["8000"]


ON_A, ON_B = ["10.0.0.1"], ["10.0.0.2"]


@pytest.mark.parametrize(
    ("prefill", "decode", "link", "listening"),
    [
        (ON_A, ON_A, "shared memory", ["127.0.0.1", "127.0.0.1"]),
        (ON_A, ON_B, "TCP", ["10.0.0.1", "10.0.0.2"]),
        (ON_A + ON_B, ON_B, "shared memory and TCP", ["10.0.0.1", "10.0.0.2", "10.0.0.2"]),
    ],
)
def test_how_prompts_are_handed_over_follows_from_the_hosts(
    prefill: list[str], decode: list[str], link: str, listening: list[str]
) -> None:
    units = [{"role": "prefill", "hosts": prefill}, {"role": "decode", "hosts": decode}]
    found = explain({"secret_file": "s", "units": units})
    assert next(v.value for v in found.values if v.key == "KV transfer") == link
    assert [p.where for p in found.ports if p.who == "ranks of other units"] == listening
    assert not any("up" in n for n in found.notes), "it runs"


@pytest.mark.parametrize(("link", "name"), [("tcp", "TCP"), ("nixl", "NIXL")])
def test_a_link_that_the_file_names_is_taken_and_ports_without_a_secret_are_listed(link: str, name: str) -> None:
    found = explain({"link": link, "units": [{"role": "prefill"}, {"role": "decode"}]})
    assert next((v.value, v.why) for v in found.values if v.key == "KV transfer") == (name, "as the file says")
    open_to_all = [p for p in found.ports if p.guard.startswith("none: keep")]
    assert [p.who for p in open_to_all] == (["ranks that speak NIXL"] if link == "nixl" else [])


@pytest.mark.parametrize(
    ("data", "note"),
    [
        ({"units": [{"role": "prefill", "count": 2}]}, "units: there are only prefill units"),
        ({"units": [{"role": "mixed", "redundant_experts": 4}]}, "they are copies on other ranks, and there is one"),
        ({"units": [{"role": "mixed", "ranks_per_host": 33}]}, "33 ranks, but the model has 32 routed experts"),
    ],
)
def test_what_up_would_refuse_is_a_note(data: dict[str, Any], note: str) -> None:
    assert any(note in n for n in explain(data).notes)


def test_keys_that_are_missing_or_open_to_others_are_notes(tmp_path: Path) -> None:
    (tmp_path / "d.yaml").write_text("api_key_file: clients\nsecret_file: hosts\n")
    (tmp_path / "clients").write_text("do-not-tell-anyone")
    (tmp_path / "clients").chmod(0o644)
    found = as_json(tmp_path / "d.yaml")
    assert any("clients, so it is refused; chmod 600 it" in n for n in found["notes"])
    assert any("hosts is not there yet; (umask 077; openssl" in n for n in found["notes"])
    assert "do-not-tell-anyone" not in json.dumps(found)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "d.yaml").write_text("model: none\n")
    code, out, err = invoke("explain", str(tmp_path / "d.yaml"))
    assert (code, out) == (2, "")
    assert str(tmp_path / "none/config.json") in err


def test_names_of_files_are_relative_to_the_deployment_file(tmp_path: Path) -> None:
    (tmp_path / "d.yaml").write_text("model: deep/er\n")
    assert Deployed(tmp_path / "d.yaml", deployment_from({"model": "deep/er"})).model == tmp_path / "deep/er"


def test_it_is_explained_without_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from brigade.cli.explain import explained;"
        f"explained(Path({str(EXAMPLES[0])!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=60).returncode == 0


def test_runs_of_numbers_are_short() -> None:
    assert explained.ranges([0, 1, 2, 7]) == "0-2 7"
    assert explained.ranges([3]) == "3"
    assert explained.ranges([0, 0, 8]) == "0 0 8"
    assert explained.ranges([]) == "none"


def test_what_waits_counts_on_units_that_decode_alone() -> None:
    units = explain({"units": [{"role": "prefill", "limits": {"max_waiting": 7}}, {"role": "decode"}]}).units
    whys = [next(v.why for v in unit.values if v.key == "max_waiting") for unit in units]
    assert whys == ["as the file says; counts while it decodes", "not given: the engine's default"]
