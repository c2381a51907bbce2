"""`brigade status`: a server's units in the terminal and for scripts, from what the server says."""

import json
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from brigade.cli import app
from brigade.cli.status import shown
from brigade.serve.units import HandOvers, Percentiles, RankReport, ServerReport, UnitReport
from tests.cli.saying import Server, saying

KEY = "a-key-of-some-length"

REPORT = ServerReport(
    model="fox",
    version="0.1.0",
    uptime=3700.0,
    ready=True,
    reason="ok",
    ttft=Percentiles(20, 0.0125, 0.5),
    tpot=Percentiles(0, None, None),
    prompt_tokens=200,
    cached_prompt_tokens=50,
    generation_tokens=999,
    finished={"stop": 3, "length": 0, "abort": 1, "error": 0},
    units=[
        UnitReport("prefill-0", "prefill", "prefill", "serving", "", 0, [RankReport(0, 2, 7, 40, 30, 0, 12, 5, 0)]),
        UnitReport(
            "decode-0",
            "decode",
            "decode",
            "serving",
            "",
            4,
            [RankReport(0, 3, 0, 40, 20, 8, 0, 5, 0), RankReport(1, 1, 0, 40, 0, 0, 0, 5, 0)],
        ),
    ],
    handovers=HandOvers({"queued": 0, "prefilling": 2, "decoding": 5}, 10, 1, 0.05),
)


@pytest.fixture
def server() -> Iterator[Server]:
    with saying(msgspec.json.encode(REPORT)) as server:
        yield server


def run(url: str, *args: str) -> tuple[int, str, str]:
    told = ["status", "--url", url, *args]
    result = CliRunner(env={"BRIGADE_API_KEY": KEY, "COLUMNS": "80"}).invoke(app, told)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.stdout, result.stderr


def test_it_shows_each_rank_its_queue_its_pages_and_its_hand_overs(server: Server) -> None:
    code, out, _ = run(server.url, "--once")
    assert code == 0
    assert server.asked == ("/debug/units", f"Bearer {KEY}")
    rows = [line.split() for line in out.splitlines()]
    assert ["prefill-0", "prefill", "0", "2", "7", "████░░", "30/40", "0", "12", "0"] in rows
    assert ["decode-0", "decode", "0", "3", "0", "███░░░", "20/40", "8", "0", "4"] in rows
    assert ["1", "1", "0", "░░░░░░", "0/40", "0", "0"] in rows
    assert "fox at" in out
    assert "up 1 h 1 min" in out
    assert "p50 12.5 ms, p99 500.0 ms, 20 requests in the last minute" in out
    assert "25.0 % of them from the prefix cache" in out
    assert "2 prefilling, 5 decoding" in out
    assert "10 fetched, 5.0 ms each, 1 computed again" in out
    assert max(map(len, out.splitlines())) <= 80


def test_large_caches_fit_into_a_terminal_of_80_characters(server: Server) -> None:
    ranks = [RankReport(0, 128, 1024, 12333, 12333, 12333, 12333, 5, 0)]
    server.body = msgspec.json.encode(replace(REPORT, units=[replace(REPORT.units[0], restarts=12, ranks=ranks)]))
    _, out, _ = run(server.url, "--once")
    rows = [line.split() for line in out.splitlines()]
    assert ["unit", "role", "rank", "run", "wait", "KV", "pages", "reserved", "offered", "restarts"] in rows
    assert ["prefill-0", "prefill", "0", "128", "1024", "██████", "12333/12333", "12333", "12333", "12"] in rows
    assert max(map(len, out.splitlines())) <= 80


def test_a_screen_with_fewer_lines_than_ranks_shows_units_and_still_all_the_rest() -> None:
    ranks = [RankReport(i, 3, 1, 40, 20, 8, 2, 5, 0) for i in range(144)]
    report = replace(REPORT, units=[REPORT.units[0], replace(REPORT.units[1], ranks=ranks)])
    console = Console(width=80, record=True, file=StringIO())
    console.print(shown(report, "here", lines=24))
    rows = [line.split() for line in console.export_text().splitlines()]
    assert len(rows) < 24
    assert ["prefill-0", "prefill", "all", "1", "2", "7", "████░░", "30/40", "0", "12", "0"] in rows
    assert ["decode-0", "decode", "all", "144", "432", "144", "███░░░", "2880/5760", "1152", "288", "4"] in rows
    console.print(shown(report, "here"))
    assert len(console.export_text().splitlines()) > 144


def test_where_nobody_looks_at_a_terminal_it_is_shown_once(server: Server) -> None:
    assert run(server.url)[:2] == run(server.url, "--once")[:2]


def test_scripts_get_what_the_server_said(server: Server) -> None:
    code, out, _ = run(server.url, "--json")
    assert (code, json.loads(out)) == (0, json.loads(server.body))


def test_a_unit_that_is_not_ready_says_why_and_the_exit_code_says_so(server: Server) -> None:
    lost = replace(REPORT.units[1], state="not ready", reason="rank 1 was lost; it is being replaced")
    server.body = msgspec.json.encode(replace(REPORT, ready=False, reason="no decode unit", units=[lost]))
    code, out, _ = run(server.url, "--once")
    assert code == 1
    assert "no decode unit" in out
    assert "decode-0: not ready: rank 1 was lost; it is being replaced" in out


def test_units_that_change_or_stop_say_so(server: Server) -> None:
    changing = replace(REPORT.units[0], next_role="decode", state="changing")
    server.body = msgspec.json.encode(replace(REPORT, units=[changing, replace(REPORT.units[1], state="draining")]))
    _, out, _ = run(server.url, "--once")
    assert "prefill-0: changing, becomes decode" in out
    assert "decode-0: draining" in out


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, b"", "needs its key: set BRIGADE_API_KEY"),
        (404, b"", "another kind of server, or an older version of Brigade"),
        (503, b'{"error": {"message": "shutting down"}}', "shutting down"),
        (200, b"{}", "did not answer as this version of Brigade does"),
        (200, b"<html>", "did not answer as this version of Brigade does"),
    ],
)
def test_another_answer_is_one_line(server: Server, status: int, body: bytes, message: str) -> None:
    server.status, server.body = status, body
    code, _, err = run(server.url, "--once")
    assert code == 1
    assert message in err
    assert err.count("\n") == 1


def test_a_server_that_is_not_there_is_one_line() -> None:
    code, _, err = run("http://127.0.0.1:9", "--once")
    assert (code, "is the server running?" in err) == (1, True)
