"""What `chat` and `bench` know about talking to an OpenAI server: addresses, server-sent events, error bodies.

Pure functions over bytes and text; the connections are their callers'. Must not import the engine.
"""

import codecs
import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from brigade.cli.fault import Fault, one_line

DEFAULT_URL = "http://127.0.0.1:8000"
MAX_ERROR_CHARS = 500


class BadStream(Exception):
    """The server's stream is not what the protocol says; the message says how."""


class ServerError(Exception):
    """The server reported an error inside the stream."""


def base_url(url: str) -> str:
    """The server's address without a trailing slash or /v1. Raises Fault (bad input) if it is no http(s) address."""
    import httpx

    try:
        parts = httpx.URL(url if "://" in url else f"http://{url}")
    except httpx.InvalidURL as e:
        raise Fault(f"--url {url}: {e}; write it like {DEFAULT_URL}", 2) from e
    whole = parts.host and (parts.port or 1) <= 65535 and not parts.query and not parts.fragment
    if parts.scheme not in ("http", "https") or not whole:
        raise Fault(f"--url {url} is not a server's address; write it like {DEFAULT_URL}", 2)
    path = parts.path.rstrip("/").removesuffix("/v1")
    return str(parts.copy_with(path=path or "/")).rstrip("/")


def is_loopback(url: str) -> bool:
    """Whether an address means this machine, so that proxies from the environment must not come between."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def headers(api_key: str | None) -> dict[str, str]:
    """Request headers that carry the key, if there is one. Raises Fault for a key that no header can hold."""
    if not api_key:
        return {}
    if not api_key.isascii() or not api_key.isprintable():
        raise Fault("the API key holds characters that cannot be sent in a header", 2)
    return {"Authorization": f"Bearer {api_key}"}


def error_text(status: int, body: bytes) -> str:
    """An error answer in one line: OpenAI's error.message where there is one, else the beginning of the body."""
    text = body[: 4 * MAX_ERROR_CHARS].decode("utf-8", "replace")
    with suppress(ValueError, RecursionError):  # not JSON: the text itself is the best there is
        text = message_of(json.loads(body)) or text
    text = one_line(text)[:MAX_ERROR_CHARS]
    return f"HTTP {status}: {text}" if text else f"HTTP {status}"


def message_of(answer: Any) -> str | None:
    """The message of an error in OpenAI's shape, or None if `answer` is none."""
    error = answer.get("error") if isinstance(answer, dict) else None
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return str(error["message"])
    return error if isinstance(error, str) else None


def model_ids(body: bytes) -> list[str]:
    """The ids in an answer of /v1/models. Raises BadStream if it is something else."""
    try:
        ids = [model["id"] for model in json.loads(body)["data"]]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise BadStream("/v1/models did not answer with a list of models") from e
    if not all(isinstance(i, str) for i in ids):
        raise BadStream("/v1/models lists a model whose id is not text")
    return ids


class EventDecoder:
    """Cuts a byte stream into the data of server-sent events, whatever chunks it arrives in.

    httpx's own line splitting also splits at characters like U+2028, which JSON may hold unescaped; this one splits
    at CR, LF and CRLF only, as the standard says.
    """

    def __init__(self) -> None:
        self._text = codecs.getincrementaldecoder("utf-8")("replace")
        self._line = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[str]:
        """Data of the events that are complete now."""
        # A CR at the end waits for what follows it, since CRLF is one line end.
        text = self._line + self._text.decode(chunk)
        held = "\r" if text.endswith("\r") else ""
        lines = text.removesuffix(held).replace("\r\n", "\n").replace("\r", "\n").split("\n")
        self._line = lines.pop() + held
        return [data for line in lines if (data := self._take(line)) is not None]

    def _take(self, line: str) -> str | None:
        if line == "":
            data, self._data = self._data, []
            return "\n".join(data) if data else None
        field, _, value = line.partition(":")
        if field == "data":
            self._data.append(value.removeprefix(" "))
        return None


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event of a streamed answer adds."""

    text: str = ""
    reasoning: str = ""
    finish: str | None = None
    usage: dict[str, Any] | None = None
    done: bool = False
    """The stream's regular end, `[DONE]`."""


def parse_event(data: str) -> Piece:
    """One event of /v1/chat/completions or /v1/completions.

    Raises ServerError for an error event and BadStream for what is not an event of theirs.
    """
    if data.strip() == "[DONE]":
        return Piece(done=True)
    try:
        event = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise BadStream(f"an event is not JSON: {one_line(data)[:80]}") from e
    if not isinstance(event, dict):
        raise BadStream(f"an event is not an object: {one_line(data)[:80]}")
    if event.get("error"):
        raise ServerError(one_line(message_of(event) or json.dumps(event["error"]))[:MAX_ERROR_CHARS])
    try:
        choice = event["choices"][0] if event["choices"] else {}
        delta = choice.get("delta") or {}
        return Piece(
            text=_text(choice.get("text")) + _text(delta.get("content")),
            reasoning=_text(delta.get("reasoning_content")),
            finish=choice.get("finish_reason"),
            usage=event.get("usage"),
        )
    except (KeyError, TypeError, AttributeError) as e:
        raise BadStream(f"an event has another shape than OpenAI's: {one_line(data)[:80]}") from e


def _text(value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"text expected, not {type(value).__name__}")
    return value or ""
