"""`brigade up`: the file's settings reach the engine and the server; what cannot run ends before anything starts."""

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from brigade.cli.deployed import Deployed, read_key
from brigade.cli.fault import Fault
from brigade.cli.launch import engine_config, read_launch
from brigade.engine.config import DEMO_MODEL, JOIN_PORT
from brigade.engine.terms import layout_terms
from brigade.spec.config import read_spec
from brigade.spec.deploy import HOST_PORT, deployment_from
from brigade.spec.layout import Host
from tests.cli.test_command_line import invoke

KEY = "a-key-of-sixteen-characters"


def written(folder: Path, text: str) -> Path:
    (folder / "d.yaml").write_text(text)
    return folder / "d.yaml"


def test_the_file_is_served(tmp_path: Path) -> None:
    (tmp_path / "clients").write_text(KEY + "\n")
    (tmp_path / "clients").chmod(0o600)
    file = written(
        tmp_path,
        "listen: 127.0.0.1:0\napi_key_file: clients\nlimits: {kv_memory: 16MiB, max_context: 256}\n"
        "units: [{role: mixed, ranks_per_host: 2}]\n",
    )
    command = [sys.executable, "-m", "brigade", "up", str(file), "--log-level", "warning"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().removeprefix("Brigade is ready at ").strip()
        body = json.dumps({"model": "brigade-demo", "prompt": "Once", "max_tokens": 4}).encode()
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/completions", body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 4
    finally:
        server.send_signal(signal.SIGINT)
        code = server.wait(30)
        server.stdout.close()  # type: ignore[union-attr]
    assert code == 0


def test_a_fleet_on_two_hosts_is_started_from_one_file_and_its_hand_overs_are_in_the_metrics(tmp_path: Path) -> None:
    """Loopback has many addresses, so one machine can be two hosts."""
    (tmp_path / "hosts").write_text("a secret of more than sixteen bytes\n")
    (tmp_path / "hosts").chmod(0o600)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = written(
        tmp_path,
        f"listen: 127.0.0.1:0\nsecret_file: hosts\nhost_port: {port}\nlimits: {{kv_memory: 16MiB, max_context: 256}}\n"
        "units: [{role: prefill, hosts: [127.0.0.1]}, {role: decode, hosts: [127.0.0.1, 127.0.0.2]}]\n",
    )
    brigade = [sys.executable, "-m", "brigade"]
    head = subprocess.Popen(
        [*brigade, "up", str(file), "--log-level", "warning"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    other = subprocess.Popen([*brigade, "join", str(file), "--host", "127.0.0.2"], stderr=subprocess.DEVNULL)
    try:
        assert head.stdout is not None
        url = head.stdout.readline().removeprefix("Brigade is ready at ").strip()
        body = json.dumps({"model": "brigade-demo", "prompt": "Once upon a time", "max_tokens": 4}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 4
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
            metrics = answer.read().decode()
        assert 'brigade_kv_transfers_total{how="fetched"} 1.0' in metrics
        assert 'brigade_handover_requests{state="transferring"} 0.0' in metrics
        assert 'brigade_kv_pages_held{state="offered"}' in metrics
        head.send_signal(signal.SIGINT)
        assert (head.wait(30), other.wait(30)) == (0, 0)
    finally:
        for process in (head, other):
            process.kill()
            process.wait(10)
        head.stdout.close()  # type: ignore[union-attr]


def test_settings_of_the_file_are_the_engines(tmp_path: Path) -> None:
    limits = {"max_running": 5, "max_waiting": 6, "max_context": 70, "max_step_tokens": 80, "kv_memory": "1MiB"}
    limits["kv_disk"] = "/mnt/a:b:2MiB"
    limits["rank_deadline"] = 7.5
    unit = {"role": "mixed", "ranks_per_host": 3}
    data = {"weights": "int8", "drafts": 1, "wire": "fp8", "limits": limits, "units": [unit]}
    engine = engine_config(Deployed(tmp_path / "d.yaml", deployment_from(data)), read_spec(DEMO_MODEL))
    assert (engine.model, engine.weights, engine.ranks, engine.kv_bytes) == (str(DEMO_MODEL), "int8", 3, 1 << 20)
    assert (engine.kv_disk, engine.kv_disk_bytes) == ("/mnt/a:b", 2 << 20)
    assert (engine.drafts, engine.wire, engine.rank_deadline) == (1, "fp8", 7.5)
    assert (engine.max_running, engine.max_waiting, engine.max_context, engine.max_step_tokens) == (5, 6, 70, 80)


def test_a_ranks_memory_bounds_its_cache(tmp_path: Path) -> None:
    spec = read_spec(DEMO_MODEL)
    engine = engine_config(Deployed(tmp_path / "d.yaml", deployment_from({"rank_memory": "64MiB"})), spec)
    assert 0 < engine.kv_bytes < (64 << 20) // 4
    with pytest.raises(Fault, match="weights alone need"):
        engine_config(Deployed(tmp_path / "d.yaml", deployment_from({"rank_memory": "2MiB"})), spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "units: [{role: prefill}]",
            "there are only prefill units; a deployment has units of roles prefill and decode",
        ),
        ("units: [{role: mixed, ranks_per_host: 64}]", "64 ranks, but the model has 32 routed experts a layer"),
        ("model: none", "none/config.json"),
        ("drafts: 2", "drafts: must be from 0 to 1, not 2"),
        ("wire: fp4", "wire: must be auto, bf16, int8 or fp8, not 'fp4'"),
        ("limits: {rank_deadline: 0}", "limits.rank_deadline: must be seconds from 0.1 to 3600, not 0"),
        ("limits: {max_running: 600}", "max_step_tokens must be at least max_running"),
        ("api_key_file: none", "none is not a file; write the key into it: (umask 077; openssl"),
        ("api_key_file: short", "the API key has 3 characters"),
        ("api_key_file: open", "others than its owner may use"),
        ("api_key_file: two", "must hold one key on one line"),
        ("rank_memory: 2MiB", "weights alone need"),
    ],
)
def test_what_cannot_run_ends_at_once_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    for name, content in ("short", "abc"), ("open", KEY), ("two", f"{KEY}\n{KEY}\n"):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o644 if name == "open" else 0o600)
    code, out, err = invoke("up", str(written(tmp_path, text)))
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith(f"brigade: {tmp_path}")
    assert err.count("\n") == 1
    assert KEY not in err


def test_a_key_file_of_bytes(tmp_path: Path) -> None:
    (tmp_path / "k").write_bytes(b"\xff\xfe" * 16)
    (tmp_path / "k").chmod(0o600)
    with pytest.raises(Fault, match="bytes that are not plain characters"):
        read_key(tmp_path / "k", "d.yaml: api_key_file")


def two_hosts(folder: Path, *, more: str = "") -> Path:
    (folder / "hosts").write_text("a secret of more than sixteen bytes\n")
    (folder / "hosts").chmod(0o600)
    text = f"secret_file: hosts\nhost_port: 7123\n{more}units: [{{role: mixed, hosts: [10.0.0.1, 10.0.0.2]}}]\n"
    return written(folder, text)


def test_the_head_and_a_host_that_joins_agree_on_everything(tmp_path: Path) -> None:
    launch = read_launch(two_hosts(tmp_path, more="rank_memory: 1GiB\n"))
    assert launch.hosts is not None
    assert (launch.hosts.port, launch.hosts.layouts[0].n_ranks) == (7123, 2)
    join = launch.join("10.0.0.2", 5.0)
    assert (join.head, join.address, join.secret) == (("10.0.0.1", 7123), "10.0.0.2", launch.hosts.secret)
    assert join.terms == layout_terms(launch.layouts, launch.units)
    assert join.terms["kv_bytes"] == str(launch.units[0].kv_bytes) != "0"


def test_one_join_for_each_host_of_a_fleet_and_the_gateway_needs_no_ranks(tmp_path: Path) -> None:
    two_hosts(tmp_path)
    file = written(
        tmp_path,
        "secret_file: hosts\ngateway: 10.0.0.9\nunits:\n"
        "- {role: decode, count: 2, hosts: [10.0.0.2, 10.0.0.3], ranks_per_host: 2, limits: {max_running: 7}}\n"
        "- {role: prefill, hosts: [10.0.0.1, 10.0.0.2]}\n",
    )
    launch = read_launch(file)
    assert launch.fleet.names == ("decode-0", "decode-1", "prefill-0")
    assert [layout.hosts for layout in launch.layouts] == [
        (Host("10.0.0.2", 2),),
        (Host("10.0.0.3", 2),),
        (Host("10.0.0.1", 1), Host("10.0.0.2", 1)),
    ]
    assert launch.hosts is not None
    assert (launch.hosts.here, launch.hosts.others) == ("10.0.0.9", ("10.0.0.2", "10.0.0.3", "10.0.0.1"))
    terms = launch.join("10.0.0.2", 5.0).terms
    assert terms["units"] == "decode-0, decode-1, prefill-0"
    assert (terms["prefill-0 layout"], terms["decode-1 layout"]) == ("10.0.0.1 x1, 10.0.0.2 x1", "10.0.0.3 x2")
    assert terms["decode-1 max_running"] == "7"


@pytest.mark.parametrize("address", ["10.0.0.1", "10.0.0.9"])
def test_only_hosts_of_the_file_join(tmp_path: Path, address: str) -> None:
    code, _, err = invoke("join", str(two_hosts(tmp_path)), "--host", address)
    assert code == 2
    assert f"{address} is not one of the hosts that join; they are 10.0.0.2" in err


def test_a_file_leaves_no_room_for_another_secret(tmp_path: Path) -> None:
    code, _, err = invoke("join", str(two_hosts(tmp_path)), "--host", "10.0.0.2", "--secret-file", "x")
    assert code == 2
    assert "leave --model and --secret-file out" in err


def test_without_a_file_a_host_needs_a_secret() -> None:
    code, _, err = invoke("join", "10.0.0.1", "--address", "10.0.0.2")
    assert code == 2
    assert "--secret-file is missing" in err


def test_the_port_between_hosts_is_the_engines() -> None:
    assert HOST_PORT == JOIN_PORT
