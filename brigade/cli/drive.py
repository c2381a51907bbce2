"""Sends the requests of a load test and times the answers. What they mean stands in load.py; must not print.

1. closed loop: `concurrency` senders, each starts its next request when its last one ended
2. open loop: every request starts at its own arrival time, however many are still unanswered
3. each request is one streamed POST; whatever happens to it becomes one Outcome
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import httpx

from brigade.cli.fault import Fault, one_line
from brigade.cli.load import Call, Outcome
from brigade.cli.protocol import (
    BadStream,
    EventDecoder,
    ServerError,
    error_text,
    headers,
    is_loopback,
    model_ids,
    parse_event,
)

MODELS_DEADLINE = 10.0


@dataclass(frozen=True, slots=True)
class Target:
    """The server under test."""

    url: str
    model: str
    api_key: str | None
    timeout: float
    """Seconds a request may take from the moment it is due."""


class _Refused(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(slots=True)
class _Heard:
    """What has arrived of one answer, so that a failure half-way still has its times."""

    answered: bool = False
    marks: list[float] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    done: bool = False


def connect(url: str, api_key: str | None) -> httpx.AsyncClient:
    """A client without limits of its own: the server is what is measured, and each request has its own deadline."""
    return httpx.AsyncClient(
        base_url=url,
        headers=headers(api_key),
        timeout=None,  # asyncio.timeout holds the whole request
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=not is_loopback(url),
    )


async def first_model(url: str, api_key: str | None) -> str:
    """The first model of /v1/models. Raises Fault if no server answers there, or not as one should."""
    try:
        async with asyncio.timeout(MODELS_DEADLINE), connect(url, api_key) as client:
            answer = await client.get("/v1/models")
    except TimeoutError as e:
        raise Fault(f"{url}: no answer within {MODELS_DEADLINE:.0f} s") from e
    except httpx.HTTPError as e:
        raise Fault(f"{url}: no server answers ({one_line(str(e))}); start one with: brigade serve") from e
    if answer.status_code != 200:
        raise Fault(f"{url}/v1/models: {error_text(answer.status_code, answer.content)}")
    try:
        ids = model_ids(answer.content)
    except BadStream as e:
        raise Fault(f"{url}: {e}") from e
    if not ids:
        raise Fault(f"{url}: the server lists no model")
    return ids[0]


async def closed_loop(
    target: Target, calls: Sequence[Call], concurrency: int, heard: Callable[[Outcome], None]
) -> list[Outcome]:
    """Run all calls, `concurrency` at a time. `heard` is called as each one ends."""
    left: Iterator[Call] = iter(calls)
    outcomes: list[Outcome] = []

    async def sender(client: httpx.AsyncClient) -> None:
        for call in left:
            outcome = await send(client, target, call, perf_counter())
            outcomes.append(outcome)
            heard(outcome)

    async with connect(target.url, target.api_key) as client, asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(calls))):
            group.create_task(sender(client))
    return outcomes


async def open_loop(
    target: Target, calls: Sequence[Call], times: Sequence[float], heard: Callable[[Outcome], None]
) -> list[Outcome]:
    """Start call i `times[i]` seconds from now, whatever became of the others. `heard` is called as each one ends."""
    outcomes: list[Outcome] = []

    async def one(client: httpx.AsyncClient, call: Call, due: float) -> None:
        outcome = await send(client, target, call, due)
        outcomes.append(outcome)
        heard(outcome)

    async with connect(target.url, target.api_key) as client, asyncio.TaskGroup() as group:
        start = perf_counter()
        for call, at in zip(calls, times, strict=True):
            await asyncio.sleep(max(0.0, start + at - perf_counter()))
            group.create_task(one(client, call, start + at))
    return outcomes


async def send(client: httpx.AsyncClient, target: Target, call: Call, due: float) -> Outcome:
    """One request, timed from `due`. Never raises for what a server or a network may do."""
    late = perf_counter() - due
    heard = _Heard()
    failure, detail = "", ""
    body = {"model": target.model, **call.body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with asyncio.timeout(max(0.0, target.timeout - late)):
            await _listen(client, call.path, body, heard)
    except TimeoutError:
        failure, detail = "timeout", f"no complete answer within {target.timeout:g} s"
    except _Refused as e:
        failure, detail = f"HTTP {e.status}", str(e)
    except ServerError as e:
        failure, detail = "error event", str(e)
    except BadStream as e:
        failure, detail = "bad answer", str(e)
    except (httpx.HTTPError, httpx.StreamError) as e:
        failure = "broken stream" if heard.answered else "no connection"
        detail = one_line(f"{type(e).__name__}: {e}")
    end = perf_counter()
    if not failure and not heard.done:
        failure, detail = "broken stream", "the stream ended without [DONE]"
    n_in, n_out, n_cached = _counts(heard.usage)
    if not failure and n_out is None:
        failure, detail = "no usage", "the answer does not say how many tokens it has (usage)"
    return Outcome(due, end, tuple(heard.marks), n_in or 0, n_out or 0, n_cached or 0, failure, detail, late)


async def _listen(client: httpx.AsyncClient, path: str, body: dict[str, Any], heard: _Heard) -> None:
    async with client.stream("POST", path, json=body) as answer:
        if answer.status_code != 200:
            raise _Refused(answer.status_code, error_text(answer.status_code, await answer.aread()))
        heard.answered = True
        decoder = EventDecoder()
        async for chunk in answer.aiter_bytes():
            now = perf_counter()
            for data in decoder.feed(chunk):
                piece = parse_event(data)
                if piece.text or piece.reasoning:
                    heard.marks.append(now)
                heard.usage = piece.usage or heard.usage
                heard.done = heard.done or piece.done


def _counts(usage: dict[str, Any] | None) -> tuple[int | None, int | None, int | None]:
    """Prompt, completion and cached tokens; None where the server does not say."""
    if not isinstance(usage, dict):
        return None, None, None
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")), _count(cached)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
