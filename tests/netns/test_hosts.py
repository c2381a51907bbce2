"""Hosts as network namespaces: the same text, and cables that are cut and healed again."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.running import command, serving, until
from tests.engine.hosting import secret_file
from tests.netns.network import Network, network, why_not

pytestmark = [
    pytest.mark.skipif(bool(why := why_not()), reason=f"needs network namespaces: {why}"),
    pytest.mark.timeout(240),
]

JOIN_PORT, HTTP_PORT, DEADLINE = 7000, 8000, 5.0
ASK = {"model": "brigade-demo", "prompt": "The old boat", "max_tokens": 24, "temperature": 0}
LONG = {"model": "brigade-demo", "prompt": "Once", "max_tokens": 300, "ignore_eos": True, "stream": True}


class Unit:
    """A unit whose head is host 0; requests are made on the head's own loopback."""

    def __init__(self, net: Network, log: Path) -> None:
        self.net, self._log = net, log

    def get(self, path: str) -> int:
        return self.net.on(0, lambda: httpx.get(f"{_URL}{path}", timeout=10).status_code)

    def post(self, body: dict[str, Any], seconds: float = 60) -> httpx.Response:
        return self.net.on(0, lambda: httpx.post(f"{_URL}/v1/completions", json=body, timeout=seconds))

    def text(self) -> str:
        reply = self.post(ASK)
        assert reply.status_code == 200, reply.text
        text: str = reply.json()["choices"][0]["text"]
        return text

    def log(self) -> str:
        return self._log.read_text()


_URL = f"http://127.0.0.1:{HTTP_PORT}"


@contextmanager
def unit_on(net: Network, sizes: list[int], folder: Path) -> Iterator[Unit]:
    secret, log = secret_file(folder), folder / "head.log"
    hosts = ",".join(f"{address}={n}" for address, n in zip(net.addresses, sizes, strict=True))
    shared = ["--secret-file", str(secret)]
    head = ["serve", "--port", str(HTTP_PORT), "--hosts", hosts, "--threads", "1", "--rank-deadline", str(DEADLINE)]
    with ExitStack() as stack:

        def start(host: int, *arguments: str, **streams: Any) -> "subprocess.Popen[str]":
            process = subprocess.Popen(net.command(host, *command(*arguments)), text=True, **streams)
            stack.callback(process.wait, 10)
            stack.callback(process.kill)
            return process

        for host in range(1, len(sizes)):
            where = ["join", f"{net.addresses[0]}:{JOIN_PORT}", "--address", net.addresses[host]]
            start(host, *where, *shared, stderr=subprocess.DEVNULL)
        with log.open("w") as err:
            server = start(0, *head, *shared, stdout=subprocess.PIPE, stderr=err)
        stack.callback(server.terminate)  # first of all: the head sends the others away
        assert server.stdout is not None
        stack.callback(server.stdout.close)
        line = server.stdout.readline()
        assert re.match("Brigade is ready at ", line), log.read_text()
        yield Unit(net, log)


@pytest.fixture(scope="module")
def expected() -> str:
    with serving() as one:
        reply = httpx.post(f"{one.url}/v1/completions", json=ASK, timeout=30).json()
        text: str = reply["choices"][0]["text"]
        return text


def test_four_hosts_say_what_one_says(expected: str, tmp_path: Path) -> None:
    with network(4) as net, unit_on(net, [1, 1, 1, 1], tmp_path) as unit:
        assert unit.text() == expected


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unit]:
    with network(2) as net, unit_on(net, [1, 2], tmp_path_factory.mktemp("pair")) as unit:
        yield unit


def test_two_hosts_say_what_one_says(pair: Unit, expected: str) -> None:
    assert pair.text() == expected


def test_ports_between_hosts_are_open_on_addresses_of_the_layout_alone(pair: Unit) -> None:
    for host in (0, 1):
        listed = subprocess.run(
            pair.net.command(host, "ss", "-Hltn"), capture_output=True, text=True, check=True, timeout=20
        ).stdout
        ports = [line.split()[3] for line in listed.splitlines()]
        assert ports, listed
        http = [f"127.0.0.1:{HTTP_PORT}"] if host == 0 else []
        assert all(p.startswith(f"{pair.net.addresses[host]}:") for p in ports if p not in http), ports


@pytest.mark.parametrize("fault", ["cut", "black_hole"])
def test_a_cable_that_is_cut_and_healed(pair: Unit, expected: str, fault: str) -> None:
    until(lambda: pair.get("/ready") == 200, 30, "ready")
    ended: list[tuple[float, bool]] = []
    running = threading.Barrier(7)

    def read(i: int) -> None:
        body = {**LONG, "prompt": f"Once {i}"}
        last: list[str] = []
        with httpx.stream("POST", f"{_URL}/v1/completions", json=body, timeout=30) as stream:
            for n, line in enumerate(stream.iter_lines()):
                if n == 0:
                    running.wait(20)
                if line.startswith("data: "):
                    last = [line]
        ended.append((time.monotonic(), last == ["data: [DONE]"] or "error" not in json.loads(last[0][6:])))

    readers = [threading.Thread(target=pair.net.on, args=(0, read, i)) for i in range(6)]
    for reader in readers:
        reader.start()
    running.wait(30)
    lost = time.monotonic()
    getattr(pair.net, fault)(1)
    until(lambda: pair.get("/ready") == 503, DEADLINE, "not ready")
    noticed = time.monotonic() - lost
    assert f"host {pair.net.addresses[1]} (ranks 1 to 2) is gone" in pair.log()
    time.sleep(1)
    assert pair.get("/ready") == 503, "not before the cable is whole"
    pair.net.heal(1)
    healed = time.monotonic()
    until(lambda: pair.get("/ready") == 200, 40, "ready again")
    again = time.monotonic() - healed
    for reader in readers:
        reader.join(30)
    last = max(at for at, _ in ended) - healed
    assert [fine for _, fine in ended] == [True] * 6, "those on the lost host went on as well"
    assert pair.text() == expected
    print(f"{fault}: noticed {noticed:.1f} s, serving {again:.1f} s after healing, last client {last:.1f} s")


def test_two_hosts_that_reach_the_head_and_not_each_other(expected: str, tmp_path: Path) -> None:
    with network(3) as net, unit_on(net, [1, 1, 1], tmp_path) as unit:
        net.part(1, 2)
        replies: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: replies.append(unit.post({**LONG, "stream": False})))
        asking.start()
        until(lambda: re.search("lost and being replaced: .*rank [12]", unit.log()), 2 * DEADLINE + 1, "a culprit")
        assert unit.get("/ready") == 503
        net.join(1, 2)
        until(lambda: unit.get("/ready") == 200, 60, "ready again")
        asking.join(30)
        assert [r.status_code for r in replies] == [200], "its request has waited for the unit"
        assert unit.text() == expected


def test_no_namespace_is_left_behind_when_a_test_fails() -> None:
    def namespaces() -> set[str]:
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True, timeout=20)
        return {line.split()[0] for line in listed.stdout.splitlines()}

    before = namespaces()
    code = "import sys; from tests.netns.network import network\nwith network(2): sys.exit(3)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 3
    assert namespaces() == before
    killed = "import os, signal; from tests.netns.network import network\n"
    killed += "with network(1): os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", killed], check=False, timeout=60)
    assert namespaces() > before
    with network(1):
        pass
    assert namespaces() == before, "the next one cleans up"
