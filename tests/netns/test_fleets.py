"""Prefill and decode units on hosts of their own, which are network namespaces: the same text as one rank, also when a
host is cut off or killed while it works.

Host 0 is the gateway and has no ranks, host 1 has a prefill and a decode unit, host 2 another decode unit."""

import asyncio
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from brigade import Brigade, SamplingParams
from tests.end_to_end.running import command, until
from tests.engine.hosting import secret_file
from tests.netns.network import Network, network, why_not

pytestmark = [
    pytest.mark.skipif(bool(why := why_not()), reason=f"needs network namespaces: {why}"),
    pytest.mark.timeout(240),
]

URL = "http://127.0.0.1:8000"
BOTH, DECODE = 1, 2
QUEUED_S = 30.0
"""Seconds that a request may wait for a unit."""
PROMPTS = [
    f"{begin} {what}" for begin in ("The old boat", "Once upon a time") for what in ("", "a little", "and", "he")
]
N_NEW = 200


class Fleet:
    """A deployment file that runs; requests are made on the gateway's own loopback."""

    def __init__(self, net: Network, file: Path, stack: ExitStack) -> None:
        self.net, self._file, self._stack, self.log = net, file, stack, file.parent / "gateway.log"
        self._joined: dict[int, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        for host in (BOTH, DECODE):
            self.join(host)
        with self.log.open("w") as log:
            up = subprocess.Popen(
                self.net.command(0, *command("up", str(self._file))), stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert up.stdout is not None
        self._stack.callback(up.stdout.close)
        self._stack.callback(up.wait, 30)
        self._stack.callback(up.terminate)
        assert re.match("Brigade is ready at ", up.stdout.readline()), self.log.read_text()

    def join(self, host: int) -> None:
        join = command("join", str(self._file), "--host", self.net.addresses[host], "--log-level", "error")
        process = self._joined[host] = subprocess.Popen(self.net.command(host, *join), stderr=subprocess.DEVNULL)
        self._stack.callback(process.wait, 30)
        self._stack.callback(process.kill)  # one that is cut off does not hear the gateway's end

    def kill(self, host: int) -> None:
        """A machine without power: all of it at once."""
        supervisor = psutil.Process(self._joined[host].pid)
        for process in (*supervisor.children(recursive=True), supervisor):
            process.send_signal(signal.SIGKILL)
        self._joined[host].wait(10)

    def get(self, path: str) -> httpx.Response:
        return self.net.on(0, lambda: httpx.get(f"{URL}{path}", timeout=10))

    def metric(self, name: str) -> float:
        text = self.get("/metrics").text
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)[1])  # type: ignore[index]

    def units(self) -> list[str]:
        """Those whose ranks answer."""
        told = self.get("/debug/experts")
        return [u["unit"] for u in told.json()["units"] if u["loads"]] if told.status_code == 200 else []

    def held(self) -> float:
        """Pages that anybody holds for a request."""
        states = ("running", "offered", "reserved")
        return sum(self.metric(f'brigade_kv_pages_held{{state="{state}"}}') for state in states)

    def ask_all(self, during: Any) -> tuple[list[str], float]:
        """All prompts at once, and `during` when tokens of each have come; texts, and seconds since then."""
        return self.net.on(0, lambda: asyncio.run(_ask_all(during)))


async def _ask_all(during: Any) -> tuple[list[str], float]:
    running = asyncio.Barrier(len(PROMPTS) + 1)

    async def ask(client: httpx.AsyncClient, prompt: str) -> str:
        body = {"model": "brigade-demo", "prompt": prompt, "max_tokens": N_NEW, "temperature": 0, "ignore_eos": True}
        parts: list[str] = []
        async with client.stream("POST", f"{URL}/v1/completions", json={**body, "stream": True}) as stream:
            async for line in stream.aiter_lines():
                if line.startswith("data: {"):
                    event = httpx.Response(200, text=line[6:]).json()
                    assert "error" not in event, event
                    parts.append(event["choices"][0]["text"])
                    if len(parts) == 2:
                        await running.wait()
        return "".join(parts)

    async with httpx.AsyncClient(timeout=QUEUED_S + 10) as client:
        asked = [asyncio.create_task(ask(client, prompt)) for prompt in PROMPTS]
        await running.wait()
        began = time.monotonic()
        await asyncio.to_thread(during)
        return await asyncio.gather(*asked), time.monotonic() - began


@pytest.fixture(scope="module")
def expected() -> list[str]:
    with Brigade() as one:
        params = SamplingParams(temperature=0, max_tokens=N_NEW, ignore_eos=True)
        return [c.text for c in one.generate(PROMPTS, params)]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    with network(3) as net, ExitStack() as stack:
        hosts = net.addresses
        file = folder / "d.yaml"
        file.write_text(
            f"gateway: {hosts[0]}\nsecret_file: {secret_file(folder)}\nlimits: {{kv_memory: 16MiB}}\nunits:\n"
            f"- {{role: prefill, hosts: [{hosts[BOTH]}]}}\n"
            f"- {{role: decode, count: 2, hosts: [{hosts[BOTH]}, {hosts[DECODE]}]}}\n"
        )
        made = Fleet(net, file, stack)
        made.start()
        yield made


def test_a_decode_host_that_is_cut_off_costs_no_request_and_no_text(fleet: Fleet, expected: list[str]) -> None:
    texts, seconds = fleet.ask_all(lambda: fleet.net.cut(DECODE))
    assert texts == expected
    assert f"host {fleet.net.addresses[DECODE]} (decode-1: rank 0) is gone" in fleet.log.read_text()
    assert fleet.get("/ready").status_code == 200, "the other unit decodes"
    until(lambda: fleet.held() == 0, 10, "all pages are back")
    fleet.net.heal(DECODE)
    print(f"decode host cut off: all {len(PROMPTS)} answers after {seconds:.1f} s")


def test_a_host_that_is_killed_with_all_prefill_is_waited_for(fleet: Fleet, expected: list[str]) -> None:
    """What the other host decodes goes on meanwhile."""

    def fault() -> None:
        fleet.kill(BOTH)
        until(lambda: fleet.get("/ready").status_code == 503, 5, "not ready")
        fleet.join(BOTH)

    until(lambda: len(fleet.units()) == 3, 20, "both decode units are there")
    texts, seconds = fleet.ask_all(fault)
    assert texts == expected
    assert seconds < QUEUED_S
    assert f"host {fleet.net.addresses[BOTH]} (prefill-0: rank 0; decode-0: rank 0) is gone" in fleet.log.read_text()
    until(lambda: fleet.held() == 0, 10, "all pages are back")
    print(f"host with prefill killed: all {len(PROMPTS)} answers after {seconds:.1f} s")


def test_ports_between_hosts_are_open_on_addresses_of_the_layout_alone(fleet: Fleet) -> None:
    until(lambda: len(fleet.units()) == 3, 30, "all units are there")
    for host, n_own in (0, 1), (BOTH, 2), (DECODE, 1):
        listed = subprocess.run(
            fleet.net.command(host, "ss", "-Hltn"), capture_output=True, text=True, check=True, timeout=20
        ).stdout
        ports = [line.split()[3] for line in listed.splitlines()]
        own = [p for p in ports if p.startswith(f"{fleet.net.addresses[host]}:")]
        assert [p for p in ports if p not in own] == (["127.0.0.1:8000"] if host == 0 else [])
        assert len(own) == n_own, "the gateway's for hosts, each rank's for ranks of other units"
