"""POST /debug/trace and `brigade trace`: what is recorded, for how long, and that nothing is left on afterwards."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema_rs import Draft202012Validator
from typer.testing import CliRunner

from brigade.cli import app
from brigade.engine import recorder
from brigade.serve.life import Life
from brigade.serve.metrics import Metrics
from tests.cli.test_chrome import check_format
from tests.serve.conftest import CHAT, COMPLETION, Live
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_bad_requests import error_of

STREAMED = {**CHAT, "stream": True, "max_tokens": 5}


async def recorded(live: Live, asked: dict[str, Any], *bodies: dict[str, Any], name: str = "mine") -> dict[str, Any]:
    """What is recorded while these requests are made."""
    async with (
        httpx.AsyncClient(base_url=live.url, timeout=20) as client,
        client.stream("POST", "/debug/trace", json=asked) as answer,
    ):
        assert answer.status_code == 200
        for body in bodies:
            path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
            await client.post(path, json=body, headers={"x-request-id": name})
        return dict(json.loads(await answer.aread()))


async def test_requests_and_ranks_are_recorded_in_the_shape_described(
    live: Live, engine: FakeEngine, client: httpx.AsyncClient
) -> None:
    got = await recorded(live, {"seconds": 0.3}, STREAMED, CHAT, COMPLETION)
    described = (await client.get("/openapi.json")).json()
    schema = {"$ref": "#/components/schemas/Recording", "components": described["components"]}
    Draft202012Validator(schema).validate(got)
    assert [r["name"] for r in got["requests"]] == ["mine"] * 3
    parts = [name for name, *_ in got["requests"][0]["parts"]]
    assert parts[:4] == ["read", "template and tokens", "submit", "stream"]
    assert parts[4:] == ["wait", "stream"] * 5
    times = [t for _, begin, end, *_ in got["requests"][0]["parts"] for t in (begin, end)]
    assert times == sorted(times)
    (unit,) = got["units"]
    assert (unit["name"], unit["ranks"][0]["parts"][0][0], unit["ranks"][0]["n_lost"]) == ("mixed-0", "attention", 3)
    assert abs(unit["ranks"][0]["offset"] - 10**12) < 10**9


async def test_it_ends_with_the_one_request_that_was_asked_for(live: Live) -> None:
    began = asyncio.get_running_loop().time()
    got = await recorded(live, {"seconds": 30, "request": "mine"}, STREAMED)
    assert asyncio.get_running_loop().time() - began < 5
    assert got["requests"][0]["ended"] > got["requests"][0]["began"]


async def test_a_second_recording_is_refused_and_a_client_that_leaves_ends_the_first(live: Live) -> None:
    async with httpx.AsyncClient(base_url=live.url, timeout=20) as client:
        async with client.stream("POST", "/debug/trace", json={"seconds": 30}):
            assert error_of(await client.post("/debug/trace", json={"seconds": 1}), 409)["code"] == "recording"
        async with asyncio.timeout(2):
            while (await client.post("/debug/trace", json={"seconds": 0.01})).status_code != 200:
                await asyncio.sleep(0.01)


async def test_a_server_that_is_to_end_does_not_wait_for_it(
    serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lives: list[Life] = []
    monkeypatch.setattr("brigade.serve.server.Life", lambda: lives.append(Life()) or lives[-1])
    live = await serving()
    recording = asyncio.create_task(recorded(live, {"seconds": 30}, STREAMED))
    await asyncio.sleep(0.1)
    lives[0].draining = True
    assert (await asyncio.wait_for(recording, 3))["units"]


@pytest.mark.parametrize(
    "body", [{}, {"seconds": 0}, {"seconds": 61}, {"seconds": "1"}, {"seconds": 1, "request": ""}, {"second": 1}]
)
async def test_what_cannot_be_recorded_is_a_400(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    error_of(await client.post("/debug/trace", json=body), 400)


async def test_it_is_behind_the_same_door_as_all_else(client: httpx.AsyncClient) -> None:
    assert (await client.post("/debug/trace", json={"seconds": 1}, headers={"host": "evil.example"})).status_code == 403
    assert (await client.post("/debug/trace", content=b"{}", headers={"content-type": "text/plain"})).status_code == 415


async def test_names_that_no_header_should_hold_are_not_taken(live: Live) -> None:
    got = await recorded(live, {"seconds": 0.2}, STREAMED, name="a b" * 99)
    assert got["requests"][0]["name"].startswith("chatcmpl-")


def test_nothing_is_kept_while_nobody_records() -> None:
    tracer = Metrics().tracer
    tracer.placed(1, 2)
    tracer.moved(1, "queued")
    trace = tracer.begin(httpx.Request("GET", "http://x"))  # type: ignore[arg-type]
    trace.end("read")
    trace.known_as("id", [1])
    trace.over()
    assert trace.spans().parts == []
    assert trace is tracer.begin(httpx.Request("GET", "http://x"))  # type: ignore[arg-type]


async def run(live: Live, *args: str) -> tuple[int, str, str]:
    told = ["trace", "--url", live.url, *args]
    result = await asyncio.to_thread(CliRunner().invoke, app, told)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.stdout, result.stderr


class TestCommand:
    async def test_a_prompt_of_its_own_is_answered_and_drawn(self, live: Live, tmp_path: Path) -> None:
        file = tmp_path / "trace.json"
        code, out, err = await run(live, "--request", "Tell me", "--max-tokens", "4", "--out", str(file))
        assert (code, "Once upon a" in out) == (0, True), err
        trace = json.loads(file.read_text())
        check_format(trace)
        assert sum(e["name"] == "request" and e["ph"] == "X" for e in trace["traceEvents"]) == 1
        assert "first 3 spans are missing" in err

    async def test_a_while_is_recorded(self, live: Live, tmp_path: Path) -> None:
        file = tmp_path / "trace.json"
        code, out, _ = await run(live, "--seconds", "0.1", "--out", str(file))
        assert (code, "attention" in out, "ui.perfetto.dev" in out) == (0, True, True)
        check_format(json.loads(file.read_text()))

    async def test_a_rank_that_does_not_tell_is_named(
        self, live: Live, engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(recorder, "ANSWER_DEADLINE", 0.05)
        engine.unit.is_silent = True
        code, out, err = await run(live, "--seconds", "0.1", "--out", str(tmp_path / "t.json"))
        assert (code, "no rank has run a step" in out) == (0, True)
        assert "mixed-0 rank 0 (mixed): it has not told its spans" in err

    async def test_mistakes_are_one_line(self, serving: Callable[..., Any], tmp_path: Path) -> None:
        live = await serving(api_key="long-enough")
        for args, message in (
            (("--seconds", "0.1"), "needs its key"),
            (
                ("--api-key", "long-enough", "--seconds", "0.1", "--out", "/nowhere/t.json"),
                "cannot write /nowhere/t.json",
            ),
            (("--url", "http://127.0.0.1:9"), "is the server running?"),
            (("--url", f"{live.url}/other", "--api-key", "long-enough"), "another kind of server"),
        ):
            code, _, err = await run(live, *args)
            assert (code, message in err, err.count("\n")) == (1, True, 1), err
