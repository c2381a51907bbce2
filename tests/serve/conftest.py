"""The application over a fake engine, in memory and on a real port."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from brigade.serve.app import make_app
from brigade.serve.config import ServeConfig
from brigade.serve.metrics import Metrics
from brigade.serve.server import serve
from tests.serve.fake_engine import FakeEngine

MODEL = "fox"
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Tell me a story"}]}
COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": "Tell me a story", "max_tokens": 100}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


def client_of(engine: FakeEngine, **settings: Any) -> httpx.AsyncClient:
    """A client of the application in memory: no sockets, so no timeouts and no disconnects."""
    app = make_app(engine, ServeConfig(**{"served_name": MODEL, **settings}), Metrics())  # type: ignore[arg-type]
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(engine) as client:
        yield client


@dataclass
class Live:
    """A server on a real port."""

    url: str
    task: asyncio.Task[None]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A bare TCP connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()


def post_bytes(path: str, body: dict[str, Any], *headers: str) -> bytes:
    """A POST request as it goes over the wire."""
    content = json.dumps(body).encode()
    head = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    return "\r\n".join([*head, f"Content-Length: {len(content)}", "", ""]).encode() + content


@pytest.fixture
async def serving(engine: FakeEngine) -> AsyncIterator[Callable[..., Any]]:
    """`await serving(**settings)` starts a server; it is stopped after the test."""
    tasks = []

    async def start(**settings: Any) -> Live:
        announced: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        config = ServeConfig(**{"served_name": MODEL, "port": 0, **settings})
        task = asyncio.create_task(serve(engine, config, Metrics(), announced.set_result))  # type: ignore[arg-type]
        tasks.append(task)
        await asyncio.wait({task, announced}, return_when=asyncio.FIRST_COMPLETED)
        return Live(announced.result() if announced.done() else await task or "", task)

    yield start
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
async def live(serving: Callable[..., Any]) -> Live:
    return await serving()
