"""The arithmetic of bench.gateway, and its engine behind the real front end."""

import httpx

from bench.gateway import END, Load, Run, Sent, added, cut
from bench.gateway_server import KEY, MODEL, STORY, StubEngine
from brigade.serve.app import make_app
from brigade.serve.config import ServeConfig
from brigade.serve.metrics import Metrics


def chunk(event: str) -> bytes:
    data = f"data: {event}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


def test_an_answer_is_cut_before_each_text() -> None:
    head = b"HTTP/1.1 200 OK\r\n\r\n" + chunk('{"delta":{"role":"assistant","content":""}}')
    texts = [chunk('{"delta":{"content":"Once"}}'), chunk('{"delta":{"content":" upon"}}')]
    rest = chunk('{"delta":{},"finish_reason":"length"}') + END
    assert cut(head + b"".join(texts) + rest) == [head, texts[0], texts[1] + rest]


def test_what_the_engine_took_is_no_added_latency() -> None:
    load = Load(8, [Sent(0, 1, 2), Sent(due=1_000_000, first=9_000_000, end=44_500_000)])
    first, end = added(load, Run(1, 2, 1.0, 1.0), {"1": [2_000_000, 7_000_000, 42_000_000]})
    assert first == [3.0], "it came 8 ms after it was due, and the engine had it for 5 ms"
    assert end == [3.5]


async def test_the_engine_gives_as_many_tokens_as_were_asked_for_and_says_when() -> None:
    metrics = Metrics()
    engine = StubEngine(metrics, 0.0)
    app = make_app(engine, ServeConfig(served_name=MODEL, api_key=KEY), metrics)  # type: ignore[arg-type]
    body = {"model": MODEL, "messages": [{"role": "user", "content": STORY}], "max_tokens": 3, "seed": 7}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        answer = await client.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {KEY}"})
    assert answer.json()["choices"][0]["message"]["content"] == "Once upon a"
    came, first, last = engine.times[7]
    assert came <= first < last
