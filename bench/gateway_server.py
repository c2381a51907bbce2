"""The servers that `bench.gateway` measures, each in a process of its own: Brigade's HTTP front end over an engine that
takes no computing time, and the least that could write the same bytes.

    python -m bench.gateway_server CORE TOKEN_SECONDS TIMES_FILE [PIECES_FILE]

Ends at SIGTERM and then writes into TIMES_FILE what happened when, by the seed that a request carries: when it came,
when its first and its last token were given, in nanoseconds of the clock that all processes share.
"""

import asyncio
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvloop

from brigade.engine.config import DEMO_MODEL
from brigade.engine.generation import Generation
from brigade.engine.messages import Ready, Token
from brigade.engine.output import BadRequest, Health, QueueFull
from brigade.engine.tokenizer import Tokenizer
from brigade.serve.config import ServeConfig
from brigade.serve.metrics import Metrics
from brigade.serve.server import serve, spare_collector
from brigade.spec.config import read_json, read_spec
from brigade.spec.sampling import SamplingParams

MODEL, KEY = "brigade-demo", "a-key-for-the-bench"
STORY = "Once upon a time there was a little fox who lived in the woods with her mother and two brothers."
ROOM = 4096
"""Requests in flight that the engine takes."""

Times = dict[int, list[int]]


class StubEngine:
    """What the server needs of a Fleet. A generation gets each token `token_seconds` after the one before."""

    def __init__(self, metrics: Metrics, token_seconds: float) -> None:
        self.spec, self.tokenizer = read_spec(DEMO_MODEL), Tokenizer(DEMO_MODEL)
        self.generation: dict[str, Any] = read_json(DEMO_MODEL / "generation_config.json")
        self.config, self.most = SimpleNamespace(model=str(DEMO_MODEL)), ROOM
        self.ready = Ready(n_pages=1 << 16, page=16, max_context=2048, notes=[])
        self.failed = False
        self.times: Times = {}
        self._metrics, self._seconds = metrics, token_seconds
        self._story = self.tokenizer.encode(STORY)
        self._running: dict[int, Generation] = {}
        self._rids = itertools.count()

    async def submit(self, prompt: list[int], params: SamplingParams, salt: str = "", priority: int = 0) -> Generation:
        """As Fleet.submit."""
        times = self.times[params.seed or 0] = [time.monotonic_ns(), 0, 0]
        params.check(self.spec.vocab)
        if len(prompt) + params.max_tokens > self.ready.max_context:
            raise BadRequest("the prompt is too long", "prompt", "context_length_exceeded")
        if len(self._running) >= ROOM:
            raise QueueFull("too many requests run", 1.0)
        generation = Generation(next(self._rids), len(prompt), params, self.tokenizer, self._metrics, self._on_end)
        self._running[generation.rid] = generation
        asyncio.get_running_loop().call_later(self._seconds, self._step, generation, 0, times)
        return generation

    def _step(self, generation: Generation, i: int, times: list[int]) -> None:
        if generation.rid not in self._running:
            return
        last = i + 1 >= generation.params.max_tokens
        times[2] = time.monotonic_ns()
        times[1] = times[1] or times[2]
        generation.push(Token(generation.rid, self._story[i % len(self._story)], "length" if last else ""))
        if not last:
            asyncio.get_running_loop().call_later(self._seconds, self._step, generation, i + 1, times)

    def _on_end(self, generation: Generation, tell_worker: bool) -> None:
        self._running.pop(generation.rid, None)

    def health(self) -> Health:
        return Health(True, "ok")

    def drain(self) -> None: ...

    async def idle(self, deadline: float) -> bool:
        return not self._running


class BareServer(asyncio.Protocol):
    """Writes `pieces` to whoever sends something: the first at once, each further one `token_seconds` later."""

    def __init__(self, pieces: list[bytes], token_seconds: float, times: Times) -> None:
        self._pieces, self._seconds, self._times = pieces, token_seconds, times
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.WriteTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """A request: small ones come in one piece here, and end with their seed."""
        times = self._times[int(data[data.rindex(b":") + 1 : -1])] = [time.monotonic_ns(), 0, 0]
        self._transport.write(self._pieces[0])
        self._loop.call_later(self._seconds, self._next, 1, times)

    def _next(self, i: int, times: list[int]) -> None:
        times[2] = time.monotonic_ns()
        times[1] = times[1] or times[2]
        self._transport.write(self._pieces[i])
        if i + 1 < len(self._pieces):
            self._loop.call_later(self._seconds, self._next, i + 1, times)


async def serve_stub(token_seconds: float) -> Times:
    """Brigade's front end, until a signal ends it."""
    metrics = Metrics()
    engine = StubEngine(metrics, token_seconds)
    config = ServeConfig(served_name=MODEL, port=0, api_key=KEY)
    spare_collector()
    await serve(engine, config, metrics, lambda url: print(url, flush=True))  # type: ignore[arg-type]
    return engine.times


async def serve_bare(token_seconds: float, pieces: list[bytes]) -> Times:
    """The bare server, until a signal ends it."""
    times: Times = {}
    loop, end = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, end.set)
    server = await loop.create_server(lambda: BareServer(pieces, token_seconds, times), "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await end.wait()
    server.close()
    return times


def main(core: str, token_seconds: str, times: str, pieces: str = "") -> int:
    """Returns the exit status."""
    os.sched_setaffinity(0, {int(core)})
    seconds = float(token_seconds)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if pieces:
            told = runner.run(serve_bare(seconds, [p.encode("latin-1") for p in json.loads(Path(pieces).read_text())]))
        else:
            told = runner.run(serve_stub(seconds))
    Path(times).write_text(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
