"""A small OpenAI server for the tests of chat and bench: its delays and failures can be worked out by hand."""

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Script:
    """How one request is answered. Times in seconds."""

    tokens: tuple[str, ...] = ("one ", "two ", "three")
    reasoning: tuple[str, ...] = ()
    first: float = 0.0
    gap: float = 0.0
    status: int = 200
    error: str = ""
    ending: str = "done"
    """done, cut (connection lost), quiet (no [DONE]), event (an error event), garbage, hang."""
    usage: bool = True
    finish: str = "stop"


@dataclass
class FakeServer:
    """Runs in a thread; use it as a context manager."""

    script: Callable[[dict[str, Any]], Script] = lambda body: Script()
    models: list[str] = field(default_factory=lambda: ["fake-model"])
    requests: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    in_flight: int = 0
    max_in_flight: int = 0
    url: str = ""

    def __enter__(self) -> "FakeServer":
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _run(self, started: threading.Event) -> None:
        async def main() -> None:
            self._stop = asyncio.Event()
            server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            started.set()
            await self._stop.wait()
            server.close()

        self._loop.run_until_complete(main())
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.01))
        self._loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            path = head[0].split()[1]
            headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:]) if k}
            body = json.loads(await reader.readexactly(int(headers.get("content-length", "0"))) or b"{}")
            self.requests.append((path, headers, body))
            if path == "/health":
                self._whole(writer, 200, {})
            elif path == "/v1/models":
                self._whole(writer, 200, {"data": [{"id": i} for i in self.models]})
            else:
                self.in_flight += 1
                self.max_in_flight = max(self.max_in_flight, self.in_flight)
                await self._answer(writer, path, self.script(body))
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            if path not in ("/health", "/v1/models"):
                self.in_flight -= 1
            writer.close()

    def _whole(self, writer: asyncio.StreamWriter, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)

    async def _answer(self, writer: asyncio.StreamWriter, path: str, script: Script) -> None:
        if script.status != 200:
            self._whole(writer, script.status, {"error": {"message": script.error}})
            return
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
            b"Connection: close\r\n\r\n"
        )
        chat = path == "/v1/chat/completions"
        deltas = [{"reasoning_content": t} for t in script.reasoning] + [{"content": t} for t in script.tokens]
        if chat:
            self._event(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for i, delta in enumerate(deltas):
            await writer.drain()
            await asyncio.sleep(script.gap if i else script.first)
            self._event(writer, {"choices": [{"delta": delta} if chat else {"text": delta["content"]}]})
        await writer.drain()
        match script.ending:
            case "cut":
                return
            case "hang":
                await asyncio.sleep(60)
            case "event":
                self._event(writer, {"error": {"message": script.error}})
            case "garbage":
                self._chunk(writer, b"data: {nonsense\n\n")
            case _:
                self._event(writer, {"choices": [{"delta": {}, "text": "", "finish_reason": script.finish}]})
                if script.usage:
                    usage = {"prompt_tokens": 7, "completion_tokens": len(deltas)}
                    self._event(writer, {"choices": [], "usage": usage})
        if script.ending == "done":
            self._chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")

    def _event(self, writer: asyncio.StreamWriter, content: dict[str, Any]) -> None:
        self._chunk(writer, b"data: " + json.dumps(content).encode() + b"\n\n")

    def _chunk(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
