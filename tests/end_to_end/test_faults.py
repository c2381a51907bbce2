"""What happens when things break: processes killed, clients gone, queues full, signals."""

import json
import os
import signal
import threading

import httpx
import pytest

from bench.deployment import still_running
from tests.end_to_end.running import Server, serving, until

LONG = {"model": "brigade-demo", "prompt": "Once", "max_tokens": 1000, "ignore_eos": True}


def metric(server: Server, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"brigade_{name}"))


def events(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]


def told(body: dict[str, object], server: Server) -> tuple[str, str]:
    """The text of a stream, and the last thing that it said."""
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=60) as r:
        got = events(r)
    return "".join(json.loads(e)["choices"][0]["text"] for e in got if e != "[DONE]"), got[-1]


def test_streams_of_a_killed_worker_go_on_with_the_same_text_when_it_is_replaced() -> None:
    with serving() as server:
        ask = {**LONG, "max_tokens": 300, "temperature": 0}
        want, ends = told(ask, server), list[tuple[str, str]]()
        readers = [threading.Thread(target=lambda: ends.append(told(ask, server))) for _ in range(3)]
        for r in readers:
            r.start()
        until(lambda: metric(server, "num_requests_running") == 3, 10, "three running requests")
        server.worker.send_signal(signal.SIGKILL)
        for r in readers:
            r.join(30)
        assert want[1] == "[DONE]"
        assert ends == [want] * 3
        assert metric(server, "worker_restarts_total") == 1


def test_a_frozen_worker_is_noticed_and_replaced() -> None:
    with serving("--step-deadline", "2") as server:
        server.worker.send_signal(signal.SIGSTOP)
        answer = httpx.post(f"{server.url}/v1/completions", json={**LONG, "max_tokens": 20}, timeout=30)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 20
        assert metric(server, "worker_restarts_total") == 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_is_replaced_and_all_requests_go_on_with_the_same_text(how: signal.Signals) -> None:
    deadline = 4.0
    with serving("--ranks", "2", "--threads", "1", "--rank-deadline", str(deadline)) as server:
        ends: list[tuple[int, str]] = []

        def ask() -> None:
            body = {**LONG, "max_tokens": 300, "temperature": 0}
            r = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
            ends.append((r.status_code, r.json()["choices"][0]["text"] if r.is_success else ""))

        ask()
        want = ends.pop()
        askers = [threading.Thread(target=ask) for _ in range(4)]
        for a in askers:
            a.start()
        until(lambda: metric(server, "num_requests_running") == 4, 10, "four running requests")
        first, second = server.ranks
        second.send_signal(how)
        # That it is not ready meanwhile cannot be seen from here: it may be whole again within a tenth of a second.
        until(lambda: metric(server, "worker_restarts_total") == 1, deadline + 10, "another rank in its place")
        for a in askers:
            a.join(2 * deadline + 30)
        assert ends == [want] * 4, "of the lost rank, too"
        until(lambda: httpx.get(f"{server.url}/ready").status_code == 200, 20, "ready again")
        assert first in server.ranks
        assert second not in server.ranks
        ask()
        assert ends[-1] == want


def test_pages_come_back_when_clients_leave() -> None:
    with serving() as server:
        with httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "stream": True}) as stream:
            next(stream.iter_lines())
            assert metric(server, "kv_cache_usage_ratio") > 0
        until(lambda: metric(server, "kv_cache_usage_ratio") == 0, 5, "all pages back")
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=0.3)
        until(lambda: metric(server, "kv_cache_usage_ratio") == 0, 5, "all pages back")
        assert metric(server, "num_requests_running") == 0


def test_a_full_queue_says_so_at_once() -> None:
    with serving("--max-running", "1", "--max-waiting", "1") as server:
        with (
            httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "stream": True}, timeout=30),
            httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "stream": True}, timeout=30),
        ):
            refused = httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=5)
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        until(lambda: metric(server, "num_requests_running") == 0, 5, "an empty queue")
        assert httpx.post(f"{server.url}/v1/completions", json={**LONG, "max_tokens": 2}, timeout=10).is_success


def test_a_signal_lets_running_requests_finish_and_refuses_new_ones() -> None:
    with serving() as server:
        ask = {**LONG, "max_tokens": 400, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=ask, timeout=30) as running:
            lines = running.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: httpx.get(f"{server.url}/ready").status_code == 503, 5, "not ready")
            assert httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=5).status_code == 503
            assert "data: [DONE]" in list(lines)
        assert server.process.wait(10) == 0


def test_the_worker_leaves_when_the_server_is_killed_also_while_it_stands_still() -> None:
    with serving() as server:
        family = server.family()
        server.worker.suspend()
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        assert not still_running(family, 5)
        server.process.returncode = 0  # what the end of `serving` expects; this one was killed on purpose
