"""Kubernetes objects of a deployment: they are what the API accepts, and pods have the names that the layout has."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from brigade.cli import manifest
from brigade.cli.deployment_file import parse
from brigade.spec.deploy import deployment_from
from tests.cli.kubernetes_schema import BY_KIND
from tests.cli.test_command_line import invoke

ONE_HOST = "rank_memory: 4GiB\nunits: [{role: mixed, ranks_per_host: 2}]\n"
THREE_HOSTS = """
rank_memory: 4GiB
secret_file: s
units: [{role: mixed, hosts: [10.0.0.1, 10.0.0.2, 10.0.0.3], ranks_per_host: 2}]
"""


def written(folder: Path, text: str) -> str:
    (folder / "d.yaml").write_text(text)
    return str(folder / "d.yaml")


def objects(folder: Path, text: str, *options: str) -> dict[str, dict[str, Any]]:
    code, out, err = invoke("manifest", written(folder, text), "--image", "registry.example/brigade:1", *options)
    assert code == 0, err
    return {o["kind"]: o for o in yaml.safe_load_all(out)}


def pods_of(lws: dict[str, Any]) -> list[str]:
    """DNS names inside the namespace, by LeaderWorkerSet's own rule for subdomain policy Shared."""
    assert lws["spec"]["networkConfig"]["subdomainPolicy"] == "Shared"
    name, size = lws["metadata"]["name"], lws["spec"]["leaderWorkerTemplate"]["size"]
    return [f"{name}-0.{name}", *(f"{name}-0-{worker}.{name}" for worker in range(1, size))]


@pytest.mark.parametrize("text", [ONE_HOST, THREE_HOSTS])
def test_the_objects_are_what_the_api_accepts(tmp_path: Path, text: str) -> None:
    found = objects(tmp_path, text)
    assert set(found) == set(BY_KIND)
    for kind, value in found.items():
        problems = [f"{'/'.join(map(str, e.instance_path))}: {e.message}" for e in errors(kind, value)]
        assert problems == []


def errors(kind: str, value: Any) -> list[Any]:
    return list(jsonschema_rs.validator_for(BY_KIND[kind]).iter_errors(json.loads(json.dumps(value))))


def test_the_schema_would_see_a_mistake(tmp_path: Path) -> None:
    lws = objects(tmp_path, THREE_HOSTS)["LeaderWorkerSet"]
    for path, value in (("restartPolicy", "Never"), ("size", 0), ("Size", 3)):
        wrong = deepcopy(lws)
        wrong["spec"]["leaderWorkerTemplate"][path] = value
        assert errors("LeaderWorkerSet", wrong)


@pytest.mark.parametrize("text", [ONE_HOST, THREE_HOSTS])
def test_pods_have_the_names_that_the_layout_inside_has(tmp_path: Path, text: str) -> None:
    found = objects(tmp_path, text, "--name", "crew")
    inside = deployment_from(*_parsed(found["ConfigMap"]["data"]["deploy.yaml"]))
    layout = inside.units[0].layouts()[0]
    assert [h.address for h in layout.hosts] == pods_of(found["LeaderWorkerSet"])
    assert {h.n_ranks for h in layout.hosts} == {2}
    worker = found["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]["containers"][0]
    assert worker["command"] == ["brigade", "join", "/etc/brigade/deploy.yaml", "--host", "$(POD_NAME).crew"]
    assert worker["env"][0]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"


def _parsed(text: str) -> tuple[Any, str, Any]:
    data, line_of = parse(text, "deploy.yaml")
    return data, "deploy.yaml", line_of


def test_a_lost_pod_restarts_alone_and_probes_ask_what_the_server_answers(tmp_path: Path) -> None:
    template = objects(tmp_path, ONE_HOST)["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    assert template["restartPolicy"] == "None"
    leader = template["leaderTemplate"]["spec"]["containers"][0]
    assert leader["livenessProbe"]["httpGet"]["path"] == leader["startupProbe"]["httpGet"]["path"] == "/health"
    script = leader["readinessProbe"]["exec"]["command"]
    assert script[:2] == ["python", "-c"]
    assert "http://127.0.0.1:8000/ready" in script[2]
    compile(script[2], "probe", "exec")


def test_clients_reach_the_leader_under_a_name_of_its_own(tmp_path: Path) -> None:
    service = objects(tmp_path, ONE_HOST, "--name", "crew")["Service"]
    assert service["metadata"]["name"] == "crew-http", "crew is the headless service that LeaderWorkerSet makes"
    assert service["spec"]["selector"] == {
        "leaderworkerset.sigs.k8s.io/name": "crew",
        "leaderworkerset.sigs.k8s.io/worker-index": "0",
    }


def test_no_key_is_in_the_objects_and_the_secret_is_only_named(tmp_path: Path) -> None:
    (tmp_path / "clients").write_text("do-not-tell-anyone")
    (tmp_path / "clients").chmod(0o600)
    code, out, _ = invoke("manifest", written(tmp_path, f"api_key_file: clients\n{ONE_HOST}"), "--image", "i:1")
    assert code == 0
    assert "do-not-tell-anyone" not in out
    assert "secretName: brigade-keys" in out
    assert "kubectl create secret generic brigade-keys" in out


@pytest.mark.parametrize(("options", "kind"), [((), "hostPath"), (("--model-claim", "disk"), "persistentVolumeClaim")])
def test_the_checkpoint_is_a_folder_of_the_node_or_a_claim(tmp_path: Path, options: tuple[str, ...], kind: str) -> None:
    model = Path(__file__).parents[2] / "brigade/demo"
    found = objects(tmp_path, f"model: {model}\n{ONE_HOST}", *options)
    pod = found["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]["leaderTemplate"]["spec"]
    assert next(v for v in pod["volumes"] if v["name"] == "model").keys() == {"name", kind}
    assert "model: /models/brigade-demo\n" in found["ConfigMap"]["data"]["deploy.yaml"]


def test_memory_is_that_of_the_ranks_of_a_host(tmp_path: Path) -> None:
    template = objects(tmp_path, ONE_HOST)["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    resources = template["leaderTemplate"]["spec"]["containers"][0]["resources"]
    assert resources["limits"]["memory"] == str(2 * (4 << 30)) == resources["requests"]["memory"]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("units: [{role: mixed}]", (), "'rank_memory' is missing; pods ask for memory by it"),
        ("units: [{role: decode}]", (), "there are only decode units"),
        ("rank_memory: 1GiB\nhost_port: 8000", (), "host_port: pods listen for clients on 8000; give another one"),
        (ONE_HOST, ("--image", "two words"), "--image must be an image's name without spaces"),
        (ONE_HOST, ("--image", ""), "--image must be an image's name without spaces"),
        ("units: [{role: decode}, {role: prefill}]", (), "'rank_memory' is missing"),
        ("rank_memory: 1GiB\nlimits: {kv_disk: '/mnt:1GiB'}", (), "kv_disk: pods written here have no disk for it"),
        (ONE_HOST, ("--name", "Crew"), "--name must be up to 31 small letters"),
        (ONE_HOST, ("--name", "x" * 32), "--name must be up to 31 small letters"),
    ],
)
def test_what_cannot_become_a_manifest(tmp_path: Path, text: str, options: tuple[str, ...], message: str) -> None:
    code, out, err = invoke("manifest", written(tmp_path, text), "--image", "i:1", *options)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_names_leave_room_for_what_kubernetes_appends() -> None:
    longest = "x" * 31
    assert manifest.NAME.fullmatch(longest)
    assert len(f"{longest}-prefill99-1024-" + "h" * 10) <= 63


FLEET = """
rank_memory: 4GiB
secret_file: s
units:
- {role: prefill, hosts: [10.0.0.1, 10.0.0.2], ranks_per_host: 2}
- {role: decode, count: 2, hosts: [10.0.0.2, 10.0.0.3, 10.0.0.4, 10.0.0.5]}
- {role: decode, hosts: [10.0.0.2]}
"""


def fleet(folder: Path, *options: str) -> list[dict[str, Any]]:
    code, out, err = invoke("manifest", written(folder, FLEET), "--image", "registry.example/brigade:1", *options)
    assert code == 0, err
    return list(yaml.safe_load_all(out))


def test_a_fleet_has_a_set_for_its_gateway_and_one_for_each_kind_of_unit(tmp_path: Path) -> None:
    found = fleet(tmp_path, "--name", "crew")
    for value in found:
        assert [e.message for e in errors(value["kind"], value)] == []
    sets = {o["metadata"]["name"]: o["spec"] for o in found if o["kind"] == "LeaderWorkerSet"}
    sizes = {name: (s["replicas"], s["leaderWorkerTemplate"]["size"]) for name, s in sets.items()}
    assert sizes == {"crew-gateway": (1, 1), "crew-prefill": (1, 2), "crew-decode": (2, 2), "crew-decode2": (1, 1)}
    pods = {name: s["leaderWorkerTemplate"]["workerTemplate"] for name, s in sets.items()}
    commands = {name: pod["spec"]["containers"][0]["command"] for name, pod in pods.items()}
    assert commands["crew-gateway"] == ["brigade", "up", "/etc/brigade/deploy.yaml"]
    assert commands["crew-decode"][1:] == ["join", "/etc/brigade/deploy.yaml", "--host", "$(POD_NAME).crew-decode"]
    apart = {name: "affinity" in pod["spec"] for name, pod in pods.items()}
    assert apart == {name: name != "crew-gateway" for name in sets}
    memory = {n: p["spec"]["containers"][0]["resources"]["limits"]["memory"] for n, p in pods.items()}
    assert (memory["crew-prefill"], memory["crew-decode"]) == (str(8 << 30), str(4 << 30))
    [service] = [o for o in found if o["kind"] == "Service"]
    assert service["spec"]["selector"]["leaderworkerset.sigs.k8s.io/name"] == "crew-gateway"


def test_pods_of_a_fleet_have_the_names_that_the_file_inside_has(tmp_path: Path) -> None:
    found = fleet(tmp_path)
    [config] = [o for o in found if o["kind"] == "ConfigMap"]
    inside = deployment_from(*_parsed(config["data"]["deploy.yaml"]))
    assert inside.head == "brigade-gateway-0.brigade-gateway"
    assert [[h.address for h in x.hosts] for u in inside.units for x in u.layouts()] == [
        ["brigade-prefill-0.brigade-prefill", "brigade-prefill-0-1.brigade-prefill"],
        ["brigade-decode-0.brigade-decode", "brigade-decode-0-1.brigade-decode"],
        ["brigade-decode-1.brigade-decode", "brigade-decode-1-1.brigade-decode"],
        ["brigade-decode2-0.brigade-decode2"],
    ]
