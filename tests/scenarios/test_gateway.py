"""A fleet started by `brigade up`, over HTTP: its gateway and everything behind it is killed and stands still."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from bench.deployment import Answer, Gateway, ask, shared_memory, still_running
from bench.servers import free_port
from tests.scenarios.one_rank import LONG, PROMPTS, text

pytestmark = pytest.mark.asyncio(loop_scope="module")

N = LONG.max_tokens
DEADLINE = 30.0
"""Seconds by which every client has an answer or an error."""
SMALL = "limits: {max_running: 4, max_waiting: 4, kv_memory: 1MiB}"
ROOM = 16
"""Requests that both decode units take; not for the pages of all of them."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    folder, port, files = tmp_path_factory.mktemp("fleet"), free_port(), shared_memory()
    file = folder / "fleet.yaml"
    units = "units: [{role: prefill, limits: {max_waiting: 0}}, {role: decode, count: 2}]"
    file.write_text(f"listen: 127.0.0.1:{port}\n{SMALL}\n{units}\n")
    gateway = Gateway(file, port, folder / "log")
    await gateway.start()
    family = gateway.family()
    yield gateway
    family += gateway.family()
    assert await gateway.end() == 0, gateway.log.read_text()
    assert not still_running(family, 2)
    assert shared_memory() <= files


async def ask_all(client: httpx.AsyncClient, prompts: list[list[int]]) -> list[Answer]:
    return list(await asyncio.gather(*(ask(client, p, N, DEADLINE) for p in prompts)))


async def nothing_is_held(gateway: Gateway) -> None:
    for _ in range(100):
        if not (held := (await gateway.metrics()).held):
            return
        await asyncio.sleep(0.05)
    raise AssertionError(held)


async def when_running(gateway: Gateway, n: int) -> None:
    """Wait until so many requests are decoded."""
    for _ in range(200):
        if (await gateway.metrics()).sum("handover_requests", "decoding") >= n:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("they do not begin to run")


@pytest.mark.parametrize(
    "field", ["rid", "hold", "pages", "page", "offer", "unit", "rank", "role", "kv_transfer_params", "address", "state"]
)
async def test_no_client_names_what_is_inside(gateway: Gateway, field: str) -> None:
    body = {"model": "brigade-demo", "prompt": "Once", "max_tokens": 2, field: 1}
    async with gateway.client() as client:
        answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert f"'{field}'" in answer.json()["error"]["message"] or field == answer.json()["error"]["param"]


async def test_no_client_reaches_what_is_inside(gateway: Gateway) -> None:
    async with gateway.client() as client:
        for path in (
            "/internal",
            "/kv",
            "/pages",
            "/ranks",
            "/v1/units",
            "/v1/completions/../units",
            "/drain",
            "/abort",
        ):
            for method in ("GET", "POST"):
                assert (await client.request(method, path)).status_code in (404, 405), path
    listening = [c.laddr for p in gateway.family() for c in p.net_connections("inet") if c.status == "LISTEN"]
    assert {address.ip for address in listening} == {"127.0.0.1"}


async def test_clients_that_leave_leave_nothing(gateway: Gateway) -> None:
    async with gateway.client() as client:
        answers = await asyncio.gather(*(ask(client, PROMPTS[i], N, DEADLINE, 0.05 * i) for i in range(8)))
    assert any(answer.left for answer in answers)
    await nothing_is_held(gateway)


async def test_more_than_fit_wait_or_are_told_to_come_back(gateway: Gateway) -> None:
    async with gateway.client() as client:
        asked = PROMPTS * 2
        answers = await ask_all(client, asked)
    assert {a.failure for a in answers} == {"", "HTTP 429"}
    assert sum(not a.failure for a in answers) >= 12
    assert all(a.failure or a.text == text(p) for a, p in zip(answers, asked, strict=True))
    await nothing_is_held(gateway)


async def test_as_many_choices_as_the_decode_units_take_are_answered_and_no_more(gateway: Gateway) -> None:
    """Not as many as one unit takes, or as a prefill unit's limits say."""
    body = {"model": "brigade-demo", "prompt": "Once", "max_tokens": 2, "n": ROOM}
    async with gateway.client() as client:
        whole = (await client.post("/v1/completions", json=body)).json()
        assert len(whole["choices"]) == ROOM
        refused = await client.post("/v1/completions", json=body | {"n": ROOM + 1})
    assert refused.status_code == 400
    assert f"({ROOM})" in refused.json()["error"]["message"]
    await nothing_is_held(gateway)


async def test_a_gateway_that_stands_still_for_a_while_loses_nothing(gateway: Gateway) -> None:
    before = await gateway.metrics()
    async with gateway.client() as client:
        answers = asyncio.create_task(ask_all(client, PROMPTS))
        await when_running(gateway, 2)
        gateway.process.suspend()
        await asyncio.sleep(2)
        gateway.process.resume()
        assert await answers == [Answer(text(p)) for p in PROMPTS]
    assert (await gateway.metrics()).sum("worker_restarts_total") == before.sum("worker_restarts_total")
    await nothing_is_held(gateway)


async def test_streams_go_on_when_every_rank_is_killed(gateway: Gateway) -> None:
    async with gateway.client() as client:
        answers = asyncio.create_task(ask_all(client, PROMPTS))
        await when_running(gateway, 2)
        for rank in gateway.ranks():
            rank.kill()
        assert await answers == [Answer(text(p)) for p in PROMPTS]
    assert await gateway.is_ready(DEADLINE)
    await nothing_is_held(gateway)


async def test_a_killed_gateway_leaves_nothing_and_clients_come_back(gateway: Gateway) -> None:
    """One of its ranks stands still, so it does not see that its gateway is gone."""
    async with gateway.client() as client:
        answers = asyncio.create_task(ask_all(client, PROMPTS))
        await when_running(gateway, 2)
        family = gateway.family()
        os.kill(gateway.ranks()[-1].pid, signal.SIGSTOP)
        await gateway.kill()
        broken = await asyncio.wait_for(answers, 2)
    assert {a.failure for a in broken} <= {"", "broken stream", "no connection"}
    assert [a.failure for a in broken if a.failure]
    assert all(text(p).startswith(a.text) for a, p in zip(broken, PROMPTS, strict=True))
    assert not still_running(family, 5)
    await gateway.start()
    async with gateway.client() as client:
        assert await ask_all(client, PROMPTS) == [Answer(text(p)) for p in PROMPTS]
    after = await gateway.metrics()
    assert after.sum("request_finished_total") == len(PROMPTS), "each was run once"
    assert after.sum("generation_tokens_total") == len(PROMPTS) * N
