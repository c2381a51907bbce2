"""Server-sent events, error bodies and addresses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brigade.cli.fault import Fault
from brigade.cli.protocol import (
    BadStream,
    EventDecoder,
    Piece,
    ServerError,
    base_url,
    error_text,
    headers,
    is_loopback,
    model_ids,
    parse_event,
)


@pytest.mark.parametrize(
    ("given_url", "url"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("http://host/v1/", "http://host"),
        ("https://host/prefix/v1", "https://host/prefix"),
        ("localhost:8000", "http://localhost:8000"),
    ],
)
def test_an_address_is_brought_into_one_form(given_url: str, url: str) -> None:
    assert base_url(given_url) == url


@pytest.mark.parametrize("url", ["", "ftp://host", "http://", "http://host:99999", "http://host?x=1"])
def test_what_is_no_address_of_a_server_is_bad_input(url: str) -> None:
    with pytest.raises(Fault) as e:
        base_url(url)
    assert e.value.code == 2


def test_loopback_is_told_from_the_rest() -> None:
    assert [is_loopback(u) for u in ("http://127.0.0.1:1", "http://localhost", "http://[::1]:2")] == [True] * 3
    assert not is_loopback("http://example.org")


def test_a_key_that_no_header_can_hold_is_bad_input() -> None:
    assert headers("secret") == {"Authorization": "Bearer secret"}
    assert headers(None) == {}
    with pytest.raises(Fault):
        headers("käse\r\nX: y")


@given(st.lists(st.integers(1, 9), max_size=40), st.sampled_from(["\n", "\r\n", "\r"]))
def test_events_are_the_same_however_the_bytes_are_cut(cuts: list[int], end: str) -> None:
    stream = end.join(["data: a\u2028é", "", ": comment", "id: 1", "data:b", "data: c", "", "", "data: tail", "", "x"])
    raw, decoder, out = stream.encode(), EventDecoder(), []
    for size in cuts:
        out += decoder.feed(raw[:size])
        raw = raw[size:]
    assert out + decoder.feed(raw) == ["a\u2028é", "b\nc", "tail"]


def test_an_event_gives_text_reasoning_finish_and_usage() -> None:
    assert parse_event('{"choices": [{"delta": {"content": "hi"}}]}') == Piece(text="hi")
    assert parse_event('{"choices": [{"delta": {"reasoning_content": "hm", "content": null}}]}') == Piece(
        reasoning="hm"
    )
    assert parse_event('{"choices": [{"text": "hi", "finish_reason": "stop"}]}') == Piece(text="hi", finish="stop")
    assert parse_event('{"choices": [], "usage": {"prompt_tokens": 1}}') == Piece(usage={"prompt_tokens": 1})
    assert parse_event("[DONE]") == Piece(done=True)


@pytest.mark.parametrize(
    "data", ["{", "[]", "3", "{}", '{"choices": 3}', '{"choices": ["x"]}', '{"choices": [{"text": 5}]}', "[" * 100_000]
)
def test_an_event_of_another_shape_is_a_bad_stream(data: str) -> None:
    with pytest.raises(BadStream):
        parse_event(data)


def test_an_error_event_is_the_servers_error() -> None:
    with pytest.raises(ServerError, match="worker died"):
        parse_event('{"error": {"message": "worker\\ndied"}}')


def test_an_error_answer_is_shown_in_one_printable_line() -> None:
    assert error_text(429, b'{"error": {"message": "queue\\nfull"}}') == "HTTP 429: queue full"
    assert error_text(502, b"<html>\x1b[31mBad gateway") == "HTTP 502: <html>[31mBad gateway"
    assert error_text(500, b"") == "HTTP 500"
    assert len(error_text(500, b"x" * 100_000)) < 600


def test_model_ids_come_from_a_list_of_models_only() -> None:
    assert model_ids(b'{"data": [{"id": "a"}, {"id": "b"}]}') == ["a", "b"]
    for body in (b"", b"[]", b'{"data": [{}]}', b'{"data": [{"id": 3}]}'):
        with pytest.raises(BadStream):
            model_ids(body)
