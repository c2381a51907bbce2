"""Ray starts the other hosts of a fleet, one a node; hosts are network namespaces. Needs the extra brigade[ray]."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from brigade.cli.ray_hosts import missing, ranks_by_host
from brigade.spec.layout import Host, Layout
from tests.cli.test_command_line import invoke
from tests.engine.hosting import secret_file
from tests.netns.network import Network, network, why_not

RAY_PORT = 6379
HERE = Path(sys.executable).parent
TWO = {"10.0.0.1": 2, "10.0.0.2": 2}

installed = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'brigade[ray]'")
spaces = pytest.mark.skipif(bool(why := why_not()), reason=f"needs network namespaces: {why}")


def node(address: str, cpus: float, alive: bool = True) -> dict[str, object]:
    return {"NodeManagerAddress": address, "Alive": alive, "Resources": {"CPU": cpus}}


def test_hosts_that_cannot_be_placed_are_named() -> None:
    assert missing(TWO, [node("10.0.0.1", 2), node("10.0.0.2", 8)]) == []
    assert missing(TWO, [node("10.0.0.1", 1), node("10.0.0.2", 8, alive=False)]) == [
        "10.0.0.1 has 1 CPUs in all, fewer than its 2 ranks",
        "10.0.0.2 is no node of the cluster (10.0.0.1)",
    ]
    assert missing(TWO, [])[0] == "10.0.0.1 is no node of the cluster (it has none)"


def test_a_host_is_placed_for_its_ranks_of_all_units() -> None:
    prefill = Layout((Host("10.0.0.1", 2), Host("10.0.0.2", 2)))
    decode = Layout((Host("10.0.0.2", 3), Host("10.0.0.3", 3)))
    assert ranks_by_host("10.0.0.9", [prefill, decode]) == {
        "10.0.0.9": 0,
        "10.0.0.1": 2,
        "10.0.0.2": 5,
        "10.0.0.3": 3,
    }


def deployment(folder: Path, addresses: list[str]) -> Path:
    file = folder / "d.yaml"
    file.write_text(
        f"secret_file: {secret_file(folder)}\nlimits: {{kv_memory: 16MiB}}\n"
        f"units: [{{role: prefill, hosts: [{addresses[0]}]}}, {{role: decode, hosts: [{addresses[1]}]}}]\n"
    )
    return file


@installed
@pytest.mark.parametrize(
    ("address", "message"),
    [("nowhere", "--ray must be HOST:PORT of the cluster"), ("127.0.0.1:1", "no cluster answers there")],
)
def test_a_cluster_that_is_not_there(tmp_path: Path, address: str, message: str) -> None:
    _, _, err = invoke("up", str(deployment(tmp_path, ["10.0.0.1", "10.0.0.2"])), "--ray", address)
    assert message in err
    assert err.count("\n") == 1


@contextmanager
def cluster(net: Network, n: int) -> Iterator[str]:
    """Ray on the first n hosts."""
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    # Its sockets' paths must be short.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder, ExitStack() as stack:
        for host in range(n):
            where = ["--head", f"--port={RAY_PORT}", "--include-dashboard=false", f"--temp-dir={folder}"]
            if host:
                where = [f"--address={net.addresses[0]}:{RAY_PORT}"]
            common = [f"--node-ip-address={net.addresses[host]}", "--num-cpus=1", "--object-store-memory=100000000"]
            start = net.command(host, str(HERE / "ray"), "start", "--block", *where, *common)
            with (Path(folder) / f"{host}.log").open("w") as log:
                process = subprocess.Popen(start, env=env, stdout=log, stderr=log)
            stack.callback(end, process)
            if not host:
                net.on(0, until_listening, net.addresses[0])
        yield f"{net.addresses[0]}:{RAY_PORT}"


def end(process: "subprocess.Popen[bytes]") -> None:
    """Ray and all that it started."""
    if process.poll() is None:
        every = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        _, alive = psutil.wait_procs(every, timeout=15)
        for p in alive:
            p.kill()
    process.wait(15)


def until_listening(address: str) -> None:
    import socket
    import time

    for _ in range(600):
        try:
            socket.create_connection((address, RAY_PORT), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError("Ray does not listen")


@installed
@spaces
@pytest.mark.timeout(280)
def test_a_fleet_is_started_on_ray_and_leaves_no_process(tmp_path: Path) -> None:
    brigade = [sys.executable, "-m", "brigade"]
    with network(2) as net, cluster(net, 2) as ray, ExitStack() as stack:
        file = deployment(tmp_path, net.addresses)
        log = (tmp_path / "head.log").open("w")
        stack.callback(log.close)
        up = subprocess.Popen(
            net.command(0, *brigade, "up", str(file), "--ray", ray), stdout=subprocess.PIPE, stderr=log, text=True
        )
        stack.callback(up.kill)
        assert up.stdout is not None
        line = next((x for x in up.stdout if x.startswith("Brigade is ready")), "")
        assert line, (tmp_path / "head.log").read_text()
        ask = {"model": "brigade-demo", "prompt": "The old boat", "max_tokens": 8, "temperature": 0}
        reply = net.on(0, lambda: httpx.post("http://127.0.0.1:8000/v1/completions", json=ask, timeout=60))
        assert reply.json()["usage"]["completion_tokens"] == 8, json.dumps(reply.json())
        up.terminate()
        up.stdout.close()
        assert up.wait(60) == 0
        left = [p.pid for p in psutil.process_iter(["cmdline"]) if str(file) in " ".join(p.info["cmdline"] or [])]
        assert left == []


@installed
@spaces
@pytest.mark.timeout(200)
def test_a_host_that_is_no_node_is_named_at_the_deadline(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from brigade.cli.launch import read_launch;"
        "from brigade.cli.ray_hosts import placed;"
        "placed(read_launch(Path(sys.argv[1])), sys.argv[2], seconds=3).__enter__()"
    )
    with network(2) as net, cluster(net, 1) as ray:
        file = deployment(tmp_path, net.addresses)
        done = subprocess.run(
            net.command(0, sys.executable, "-c", code, str(file), ray),
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
    assert f"{net.addresses[1]} is no node of the cluster ({net.addresses[0]})" in done.stderr
