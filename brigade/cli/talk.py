"""One conversation with an OpenAI server: keeps the history, streams each answer. Must not print."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import httpx

from brigade.cli.fault import Fault, one_line
from brigade.cli.protocol import (
    BadStream,
    EventDecoder,
    Piece,
    ServerError,
    error_text,
    headers,
    is_loopback,
    model_ids,
    parse_event,
)

READ_DEADLINE = 600.0
"""Seconds between two pieces of an answer; a request may wait that long in the server's queue."""
LIST_DEADLINE = 10.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer. Times in seconds; None where there was nothing to time."""

    text: str
    finish: str | None
    n_tokens: int | None
    ttft: float | None
    tokens_per_second: float | None


def connect(url: str, api_key: str | None, deadline: float) -> httpx.Client:
    """A client for one request or a few."""
    return httpx.Client(
        base_url=url,
        headers=headers(api_key),
        timeout=httpx.Timeout(deadline, connect=min(deadline, LIST_DEADLINE)),
        trust_env=not is_loopback(url),
    )


def list_models(url: str, api_key: str | None) -> list[str]:
    """The ids of the server's models. Raises Fault if it does not tell them."""
    try:
        with connect(url, api_key, LIST_DEADLINE) as client:
            answer = client.get("/v1/models")
    except httpx.HTTPError as e:
        raise Fault(f"{url}: no server answers ({_reason(e)})") from e
    if answer.status_code != 200:
        raise Fault(f"{url}/v1/models: {error_text(answer.status_code, answer.content)}")
    try:
        return model_ids(answer.content)
    except BadStream as e:
        raise Fault(f"{url}: {e}") from e


def is_healthy(url: str, deadline: float) -> bool:
    """Whether a server answers /health at this address. The key is not sent: it may be anyone's server."""
    try:
        with connect(url, None, deadline) as client:
            return client.get("/health").status_code == 200
    except httpx.HTTPError:
        return False


class Talk:
    """The messages so far, and how to ask for the next one."""

    def __init__(self, url: str, api_key: str | None, model: str, options: dict[str, Any], system: str | None) -> None:
        """`options` are further fields of the request, such as temperature."""
        self._url, self._api_key, self._model, self._options = url, api_key, model, options
        self._system = system
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def ask(self, question: str, show: Callable[[Piece], None]) -> Answer:
        """Send the question with the history and give each piece of the answer to `show` as it comes.

        Raises Fault when the server does not answer in full: the question is then forgotten. An answer stopped by
        KeyboardInterrupt stays in the history as far as it came.
        """
        self.messages.append({"role": "user", "content": question})
        parts: list[str] = []
        try:
            answer = self._stream(parts, show)
        except KeyboardInterrupt:
            self._remember("".join(parts))
            raise
        except (Fault, ServerError, BadStream, httpx.HTTPError, httpx.StreamError) as e:
            self.messages.pop()
            if isinstance(e, Fault):
                raise
            raise Fault(f"{self._url}: the answer broke off: {_reason(e)}") from e
        self._remember(answer.text)
        return answer

    def _remember(self, text: str) -> None:
        if text:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages.pop()

    def _stream(self, parts: list[str], show: Callable[[Piece], None]) -> Answer:
        body = {
            "model": self._model,
            "messages": self.messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._options,
        }
        sent = perf_counter()
        marks: list[float] = []
        finish, usage, done = None, None, False
        decoder = EventDecoder()
        # A client of its own: an answer that was interrupted half-way leaves nothing behind.
        with (
            connect(self._url, self._api_key, READ_DEADLINE) as client,
            client.stream("POST", "/v1/chat/completions", json=body) as answer,
        ):
            if answer.status_code != 200:
                raise Fault(f"{self._url}: {error_text(answer.status_code, answer.read())}")
            for chunk in answer.iter_bytes():
                for data in decoder.feed(chunk):
                    piece = parse_event(data)
                    if piece.text or piece.reasoning:
                        marks.append(perf_counter())
                        parts.append(piece.text)
                        show(piece)
                    finish, usage, done = piece.finish or finish, piece.usage or usage, done or piece.done
        if not done:
            raise BadStream("the stream ended without [DONE]")
        n_tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
        if not isinstance(n_tokens, int):
            n_tokens = None
        span = marks[-1] - marks[0] if marks else 0.0
        return Answer(
            text="".join(parts),
            finish=finish,
            n_tokens=n_tokens,
            ttft=marks[0] - sent if marks else None,
            tokens_per_second=(n_tokens - 1) / span if n_tokens and span > 0 else None,
        )


def _reason(e: Exception) -> str:
    return one_line(str(e)) or type(e).__name__
