"""Clients that leave, dawdle or send too much, over real sockets: their generations end, and nobody else is held up."""

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from brigade.serve.answer import Answer
from brigade.serve.config import Limits
from brigade.serve.formats import CompletionFormat, Heading
from brigade.serve.life import Life
from brigade.serve.stream import EventStream
from brigade.serve.tracer import RequestTrace
from brigade.spec.sampling import SamplingParams
from tests.serve.conftest import CHAT, COMPLETION, Live, post_bytes
from tests.serve.fake_engine import STORY, TOKENIZER, FakeEngine

CHAT_PATH = "/v1/chat/completions"


async def until(true: Callable[[], bool]) -> None:
    """Fails unless it becomes true within two seconds."""
    async with asyncio.timeout(2):
        while not true():
            await asyncio.sleep(0.005)


async def closed(reader: asyncio.StreamReader) -> bytes:
    """What the server still sends until it closes the connection, which it must do within two seconds."""
    async with asyncio.timeout(2):
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_ends_its_generations(live: Live, engine: FakeEngine, stream: bool, n: int) -> None:
    engine.stalls_after = 2
    async with live.connection() as (reader, writer):
        writer.write(post_bytes(CHAT_PATH, {**CHAT, "stream": stream, "n": n}))
        await until(lambda: len(engine.submitted) == n and all(g.read == 2 for g in engine.submitted))
        if stream:
            assert b"200 OK" in await reader.readline()
    await engine.until_idle()
    assert all(g.cancelled for g in engine.submitted)


async def test_a_client_that_leaves_while_the_worker_is_replaced_waits_for_nothing(
    live: Live, engine: FakeEngine
) -> None:
    engine.hangs_on_submit = True
    async with live.connection() as (_, writer):
        writer.write(post_bytes(CHAT_PATH, CHAT))
        await until(lambda: engine.n_hanging == 1)
    await until(lambda: engine.n_hanging == 0)


async def test_a_client_that_leaves_before_the_first_token_ends_its_generations(engine: FakeEngine) -> None:
    async def gone() -> Any:
        return {"type": "http.disconnect"}

    async def stuck(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    def start() -> Any:
        return Answer.start(engine, [[5]], [SamplingParams(n=2)], "")  # type: ignore[arg-type]

    form = CompletionFormat(Heading("fox", "cmpl-", with_usage=False), TOKENIZER, ["echo", "echo"], None)
    await EventStream(start, form, False, Life(), RequestTrace())({"type": "http"}, gone, stuck)
    assert [g.cancelled for g in engine.submitted] == [True, True]


async def test_tokens_reach_the_client_as_they_come(live: Live, engine: FakeEngine) -> None:
    engine.stalls_after = 3
    async with (
        httpx.AsyncClient(base_url=live.url) as client,
        client.stream("POST", CHAT_PATH, json={**CHAT, "stream": True}) as response,
    ):
        said = ""
        async for line in response.aiter_lines():
            if line:
                said += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content", "")
            if said == "Once upon a":
                break
    await engine.until_idle()


async def test_a_connection_serves_one_request_after_another(live: Live) -> None:
    async with httpx.AsyncClient(base_url=live.url, limits=httpx.Limits(max_connections=1)) as client:
        assert (await client.post(CHAT_PATH, content=b"{", headers={"content-type": "text/plain"})).status_code == 415
        assert (await client.post(CHAT_PATH, json={**CHAT, "stream": True})).status_code == 200
        assert (await client.post(CHAT_PATH, json=CHAT)).json()["choices"][0]["message"]["content"] == STORY


async def test_ten_megabytes_are_refused_and_the_client_hears_it(live: Live) -> None:
    async def in_pieces() -> Any:
        for _ in range(160):
            yield b" " * (64 << 10)

    async with httpx.AsyncClient(base_url=live.url) as client:
        for content in (b" " * (10 << 20), in_pieces()):
            response = await client.post(CHAT_PATH, content=content, headers={"content-type": "application/json"})
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "body_too_large"
        assert (await client.post(CHAT_PATH, json=CHAT)).status_code == 200


async def test_a_body_that_does_not_come_is_408(serving: Callable[..., Any], engine: FakeEngine) -> None:
    live = await serving(limits=Limits(body_seconds=0.1))
    async with live.connection() as (reader, writer):
        writer.write(post_bytes(CHAT_PATH, CHAT)[:-5])
        answer = await closed(reader)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"message":"the request body did not arrive' in answer
    assert engine.submitted == []


async def test_bodies_of_all_connections_together_are_bounded(serving: Callable[..., Any]) -> None:
    live = await serving(limits=Limits(all_bodies_bytes=100_000))
    big = post_bytes(CHAT_PATH, {**CHAT, "user": "x" * 60_000})
    async with live.connection() as (_, first):
        first.write(big[:-5])
        await asyncio.sleep(0.1)
        async with live.connection() as (reader, second):
            second.write(big[:-5])
            assert b"503" in await asyncio.wait_for(reader.readline(), 2)
    await asyncio.sleep(0.1)
    async with httpx.AsyncClient(base_url=live.url) as client:
        body = {**CHAT, "user": "x" * 60_000}
        assert (await client.post(CHAT_PATH, json=body)).status_code == 200


async def test_headers_that_never_end_are_431(live: Live) -> None:
    async with live.connection() as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * (1 << 20))
        answer = await closed(reader)
    assert answer.startswith(b"HTTP/1.1 431 ") or answer == b""


async def test_headers_over_the_bound_are_answered(live: Live) -> None:
    async with live.connection() as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\nX-Long: " + b"x" * ((64 << 10) + 1))
        answer = await closed(reader)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b'"error"' in answer


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: loc"])
async def test_headers_that_do_not_come_close_the_connection(serving: Callable[..., Any], sent: bytes) -> None:
    live = await serving(limits=Limits(head_seconds=0.1))
    async with live.connection() as (reader, writer):
        writer.write(sent)
        assert await closed(reader) == b""


async def test_a_long_answer_outlives_the_time_for_headers(serving: Callable[..., Any], engine: FakeEngine) -> None:
    live = await serving(limits=Limits(head_seconds=0.05))
    engine.step_seconds = 0.02
    async with httpx.AsyncClient(base_url=live.url) as client:
        response = await client.post(CHAT_PATH, json=CHAT)
    assert response.json()["choices"][0]["message"]["content"] == STORY


async def test_what_is_not_http_is_a_400_in_the_usual_shape(live: Live) -> None:
    async with live.connection() as (reader, writer):
        writer.write(b"\x16\x03\x01 hello\r\n\r\n")
        answer = await closed(reader)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'{"error":{"message":' in answer


async def test_a_client_that_stops_reading_is_cut_off_and_holds_little_memory(
    serving: Callable[..., Any], engine: FakeEngine
) -> None:
    live = await serving(limits=Limits(write_seconds=0.3))
    engine.story = "Once upon a time. " * 8000
    engine.ready = type(engine.ready)(n_pages=40, page=16, max_context=1 << 20, notes=[])
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", live.port))
        asked = {**COMPLETION, "max_tokens": 40_000, "stream": True, "logprobs": 20}
        sock.sendall(post_bytes("/v1/completions", asked))
        await until(lambda: len(engine.submitted) == 1)
        generation = engine.last
        async with asyncio.timeout(10):
            while engine.running:
                await asyncio.sleep(0.02)
    assert generation.cancelled
    assert generation.read < 20_000


async def test_a_second_request_before_the_first_is_answered_closes_the_connection(
    live: Live, engine: FakeEngine
) -> None:
    engine.stalls_after = 1
    async with live.connection() as (reader, writer):
        writer.write(post_bytes(CHAT_PATH, CHAT))
        await until(lambda: len(engine.submitted) == 1)
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert await closed(reader) == b""
    await engine.until_idle()
    assert engine.last.cancelled


async def test_one_slow_request_does_not_hold_up_others(live: Live, engine: FakeEngine) -> None:
    engine.stalls_after = 1
    async with live.connection() as (_, writer):
        writer.write(post_bytes(CHAT_PATH, CHAT))
        await until(lambda: len(engine.submitted) == 1)
        engine.stalls_after = None
        async with httpx.AsyncClient(base_url=live.url) as client:
            assert (await client.get("/health")).status_code == 200
