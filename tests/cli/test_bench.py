"""`brigade bench` against a server whose delays and failures are known."""

import json
import re
from itertools import count
from pathlib import Path
from time import perf_counter

import pytest
from typer.testing import CliRunner

from brigade.cli import app
from brigade.cli.drive import Target, connect, open_loop, send
from brigade.cli.load import Call, Outcome
from tests.cli.fake_openai import FakeServer, Script

CALL = Call("/v1/completions", {"prompt": [100], "max_tokens": 3})


def run(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["bench", *args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.stdout, result.stderr


def target(server: FakeServer, timeout: float = 10.0) -> Target:
    return Target(server.url, "fake-model", None, timeout)


async def one(server: FakeServer, timeout: float = 10.0) -> Outcome:
    async with connect(server.url, None) as client:
        return await send(client, target(server, timeout), CALL, perf_counter())


async def test_times_are_those_of_the_server() -> None:
    with FakeServer(lambda _: Script(first=0.2, gap=0.1)) as server:
        outcome = await one(server)
    assert outcome.failure == ""
    assert (outcome.n_in, outcome.n_out) == (7, 3)
    assert outcome.ttft == pytest.approx(0.2, abs=0.08)
    assert outcome.tpot == pytest.approx(0.1, abs=0.05)
    assert outcome.e2e == pytest.approx(0.4, abs=0.15)
    assert len(outcome.gaps) == 2


@pytest.mark.parametrize(
    ("script", "kind", "detail"),
    [
        (Script(status=429, error="the queue is full"), "HTTP 429", "the queue is full"),
        (Script(status=500), "HTTP 500", "HTTP 500"),
        (Script(ending="cut"), "broken stream", "peer closed"),
        (Script(ending="quiet"), "broken stream", r"without \[DONE\]"),
        (Script(ending="event", error="worker died"), "error event", "worker died"),
        (Script(ending="garbage"), "bad answer", "not JSON"),
        (Script(usage=False), "no usage", "usage"),
        (Script(ending="hang"), "timeout", "within 0.3 s"),
    ],
)
async def test_each_failure_has_its_kind_and_its_words(script: Script, kind: str, detail: str) -> None:
    with FakeServer(lambda _: script) as server:
        outcome = await one(server, timeout=0.3 if kind == "timeout" else 10.0)
    assert outcome.failure == kind
    assert re.search(detail, outcome.detail)


async def test_a_server_that_is_gone_is_a_failure_too() -> None:
    with FakeServer() as server:
        pass
    assert (await one(server)).failure == "no connection"


async def test_an_open_loop_sends_on_time_however_slow_the_answers_are() -> None:
    with FakeServer(lambda _: Script(first=0.6)) as server:
        outcomes = await open_loop(target(server), [CALL] * 8, [0.02 * i for i in range(8)], lambda _: None)
        assert server.max_in_flight == 8
    assert all(o.failure == "" for o in outcomes)


async def test_waiting_to_be_sent_counts_as_latency() -> None:
    with FakeServer() as server:
        async with connect(server.url, None) as client:
            outcome = await send(client, target(server), CALL, due=perf_counter() - 2.0)
    assert outcome.late >= 2
    assert outcome.e2e >= 2
    assert outcome.ttft is not None
    assert outcome.ttft >= 2


async def test_a_request_sent_after_its_deadline_is_a_timeout() -> None:
    with FakeServer() as server:
        async with connect(server.url, None) as client:
            outcome = await send(client, target(server, timeout=1.0), CALL, due=perf_counter() - 2.0)
    assert outcome.failure == "timeout"


def test_a_closed_loop_keeps_the_asked_number_in_flight_and_writes_table_and_json(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    with FakeServer(lambda _: Script(first=0.02)) as server:
        code, out, _ = run(
            *("--url", server.url, "--concurrency", "3", "--requests", "12", "--input-len", "5", "--output-len", "3"),
            *("--warmup", "1", "--api-key", "secret-key", "--json", str(path)),
        )
        sent = [r for r in server.requests if r[0] == "/v1/completions"]
    assert code == 0
    assert server.max_in_flight == 3
    assert len(sent) == 13
    assert all(headers["authorization"] == "Bearer secret-key" for _, headers, _ in server.requests)
    bodies = [body for _, _, body in sent]
    assert len({tuple(b["prompt"]) for b in bodies}) == 13, "no prompt is sent twice: a prefix cache would answer it"
    assert bodies[0]["stream_options"] == {"include_usage": True}
    assert bodies[0]["model"] == "fake-model"
    assert re.search(r"TTFT .* TPOT .* ITL .* E2E ", out, re.DOTALL)
    record = json.loads(path.read_text())
    assert "secret-key" not in path.read_text()
    results, settings = record["results"], record["settings"]
    assert (results["completed"], results["failed"]) == (12, 0)
    assert (results["input_tokens"], results["output_tokens"]) == (84, 36)
    assert set(results["ttft"]) == {"n", "p50", "p90", "p99", "mean"}
    assert (settings["loop"], settings["concurrency"], settings["input_len"]) == ("closed", 3, 5)
    assert record["client_machine"]["cores"] >= 1
    assert record["versions"]["httpx"]


def test_an_open_loop_with_failures_counts_them_and_exits_with_1() -> None:
    numbers = count()
    with FakeServer(lambda _: Script(status=429, error="full") if next(numbers) % 2 else Script()) as server:
        code, out, err = run(
            *("--url", server.url, "--rate", "200", "--requests", "10", "--warmup", "0", "--json", "-")
        )
    record = json.loads(out)
    assert code == 1
    assert record["results"]["failures"] == {"HTTP 429": 5}
    assert record["results"]["completed"] == 5
    assert record["settings"]["loop"] == "open"
    assert "HTTP 429: 5" in err
    assert "first error: HTTP 429: full" in err


def test_prompts_from_a_file_are_each_sent_once_unless_more_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"question": "b", "max_tokens": 5}\n')
    with FakeServer() as server:
        code, *_ = run("--url", server.url, "--prompts", str(path), "--warmup", "0", "--output-len", "9")
    assert code == 0
    bodies = sorted(
        json.dumps(b.get("prompt") or b["messages"]) + str(b["max_tokens"]) for _, _, b in server.requests[1:]
    )
    assert bodies == ['"a"9', '[{"role": "user", "content": "b"}]5']


def test_a_failed_warm_up_ends_the_run_with_the_reason() -> None:
    with FakeServer(lambda _: Script(status=400, error="no such field")) as server:
        code, out, err = run("--url", server.url)
    assert (code, out) == (1, "")
    assert err.startswith("brigade: ")
    assert "HTTP 400: no such field" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "args",
    [
        ("--concurrency", "2", "--rate", "3"),
        ("--rate", "0"),
        ("--rate", "nan"),
        ("--rate", "inf"),
        ("--prompts", "/nowhere/p.jsonl"),
        ("--prompts", "p.jsonl", "--input-len", "3"),
        ("--prompts", "p.jsonl", "--vocab", "300"),
        ("--url", "ftp://x"),
        ("--json", "/nowhere/out.json"),
        ("--requests", "0"),
        ("--vocab", "100"),
        ("--no-such-option",),
    ],
)
def test_bad_options_are_exit_2_before_anything_is_sent(args: tuple[str, ...]) -> None:
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert err


def test_no_server_is_one_clear_line() -> None:
    with FakeServer() as server:
        pass
    code, _, err = run("--url", server.url)
    assert code == 1
    assert "start one with: brigade serve" in err
    assert err.count("\n") == 1
