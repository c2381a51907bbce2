"""How the server starts and ends: announce, drain, deadline, second signal."""

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from brigade.serve.config import ConfigError, Limits, ServeConfig
from brigade.serve.metrics import Metrics
from brigade.serve.server import PortInUse, bind, serve, url_of
from tests.serve.conftest import CHAT, Live
from tests.serve.fake_engine import STORY, FakeEngine
from tests.serve.test_connections import CHAT_PATH, until


def stop(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


async def ends(live: Live) -> None:
    """Fails unless the server ends within two seconds, and without an error."""
    await asyncio.wait_for(live.task, 2)
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", live.port), timeout=1):
        pass


async def start_request(live: Live, engine: FakeEngine, **extra: Any) -> "asyncio.Task[httpx.Response]":
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(base_url=live.url) as client:
            return await client.post(CHAT_PATH, json={**CHAT, **extra})

    before = len(engine.submitted)
    task = asyncio.create_task(ask())
    await until(lambda: len(engine.submitted) > before)
    return task


async def test_port_0_announces_the_real_address_once_it_answers(live: Live) -> None:
    assert live.url.startswith("http://127.0.0.1:")
    assert live.port > 0
    async with httpx.AsyncClient(base_url=live.url) as client:
        assert (await client.get("/health")).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_an_idle_server_ends_at_the_first_signal(live: Live, number: signal.Signals) -> None:
    stop(number)
    await ends(live)


async def test_running_requests_finish_and_new_ones_are_refused(live: Live, engine: FakeEngine) -> None:
    engine.step_seconds = 0.03
    streamed = await start_request(live, engine, stream=True)
    whole = await start_request(live, engine)
    stop()
    await until(lambda: engine.draining)
    async with httpx.AsyncClient(base_url=live.url) as client:
        ready = await client.get("/ready")
        assert ready.status_code == 503
        assert ready.json()["error"]["message"] == "shutting down"
        refused = await client.post(CHAT_PATH, json=CHAT)
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        assert (await client.get("/health")).status_code == 200
    assert (await whole).json()["choices"][0]["message"]["content"] == STORY
    assert (await streamed).text.endswith("data: [DONE]\n\n")
    await ends(live)


async def test_what_still_runs_at_the_deadline_gets_an_error(serving: Callable[..., Any], engine: FakeEngine) -> None:
    live = await serving(drain_seconds=0.2)
    engine.stalls_after = 2
    streamed = await start_request(live, engine, stream=True)
    whole = await start_request(live, engine)
    stop()
    assert (await whole).status_code == 503
    last = (await streamed).text.strip().rpartition("\n\n")[2]
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the server is shutting down"
    assert all(g.cancelled for g in engine.submitted)
    await ends(live)


async def test_a_second_signal_ends_everything_at_once(serving: Callable[..., Any], engine: FakeEngine) -> None:
    live = await serving(drain_seconds=60.0)
    engine.stalls_after = 2
    running = await start_request(live, engine, stream=True)
    stop()
    await until(lambda: engine.draining)
    assert not live.task.done()
    stop(signal.SIGINT)
    await ends(live)
    with contextlib.suppress(httpx.TransportError):
        await running
    await engine.until_idle()


async def test_a_second_signal_does_not_wait_for_the_engine(
    live: Live, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(_: float) -> bool:
        await asyncio.Event().wait()
        return True

    monkeypatch.setattr(engine, "idle", never)
    stop()
    await until(lambda: engine.draining)
    stop()
    await ends(live)


async def test_an_idle_connection_does_not_delay_the_end(serving: Callable[..., Any], engine: FakeEngine) -> None:
    live = await serving(limits=Limits(exit_seconds=1))
    async with live.connection():  # an open connection without a request
        stop()
        await ends(live)


async def test_a_taken_port_is_named_with_what_to_do(engine: FakeEngine) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = ServeConfig(served_name="fox", port=port)
        with pytest.raises(PortInUse, match=rf"port {port} .*--port"):
            await serve(engine, config, Metrics(), announce=lambda _: pytest.fail("announced"))  # type: ignore[arg-type]


async def test_an_open_address_without_a_key_is_refused_before_binding(engine: FakeEngine) -> None:
    config = ServeConfig(served_name="fox", host="0.0.0.0", port=0)
    with pytest.raises(ConfigError, match="--api-key"):
        await serve(engine, config, Metrics(), announce=lambda _: pytest.fail("announced"))  # type: ignore[arg-type]


def test_an_address_for_every_network_is_announced_as_one_that_opens() -> None:
    with bind(ServeConfig(served_name="fox", host="0.0.0.0", port=0, api_key="long enough".replace(" ", "-"))) as sock:
        assert url_of(sock).startswith("http://127.0.0.1:")


async def test_ipv6_loopback_is_served(serving: Callable[..., Any]) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    live = await serving(host="::1")
    assert live.url.startswith("http://[::1]:")
    async with httpx.AsyncClient(base_url=live.url) as client:
        assert (await client.get("/v1/models")).status_code == 200
