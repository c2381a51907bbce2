"""`brigade bench`: puts load on an OpenAI server and shows latency and throughput. Must not know the engine."""

import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brigade.cli.fault import Fault
from brigade.cli.load import LOWEST_ID, PERCENTILES, Call, Outcome, arrivals, read_calls, repeat, report, synthetic
from brigade.cli.machine import describe
from brigade.cli.protocol import DEFAULT_URL, base_url
from brigade.cli.units import show_seconds

if TYPE_CHECKING:
    from rich.table import Table

DEFAULT_CONCURRENCY, DEFAULT_REQUESTS, DEFAULT_INPUT, DEFAULT_VOCAB = 8, 64, 128, 1000
_MEASURES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "E2E"}


@dataclass(frozen=True, slots=True)
class Plan:
    """One load test, checked: what to send and how."""

    calls: list[Call]
    warmup: list[Call]
    concurrency: int
    times: list[float] | None
    """Arrival times of an open loop; None: closed loop."""


def bench(
    url: Annotated[str, typer.Option(help="Address of the server.")] = DEFAULT_URL,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="BRIGADE_API_KEY", help="The server's key. Prefer the variable: other users can see command lines."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model to ask; default: the first of /v1/models.")] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, max=100_000, help="Closed loop: requests in flight at a time. Default: 8."),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Open loop: requests a second, Poisson arrivals that slow answers do not hold back."),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(min=1, max=10_000_000, help="Requests to measure. Default: 64, or each prompt of --prompts once."),
    ] = None,
    input_len: Annotated[
        int | None, typer.Option(min=1, max=1 << 24, help="Tokens of a synthetic prompt (random ids). Default: 128.")
    ] = None,
    output_len: Annotated[
        int,
        typer.Option(min=1, max=1 << 24, help="Output tokens: exact for synthetic prompts, a limit with --prompts."),
    ] = 64,
    vocab: Annotated[
        int | None,
        typer.Option(
            min=LOWEST_ID + 1,
            help=f"Synthetic prompts draw token ids from [{LOWEST_ID}, VOCAB). Default: {DEFAULT_VOCAB}, which every "
            "usual model has: servers do not tell their vocabulary.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help='JSONL with a "prompt", "messages", "turns" or "question" (and "max_tokens") on each line.'),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the synthetic prompts and of the arrival times.")] = 0,
    warmup: Annotated[int, typer.Option(min=0, help="Requests to send before, one by one, that are not counted.")] = 2,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds a request may take.")] = 300.0,
    json_path: Annotated[
        str | None, typer.Option("--json", metavar="PATH", help="Write the numbers as JSON too; - is stdout.")
    ] = None,
) -> None:
    """Measure a server: TTFT, TPOT, E2E and throughput at p50, p90 and p99.

    Failed requests are counted, never retried; any of them makes the exit code 1. Percentiles are interpolated
    linearly between the closest ranks.
    """
    url = base_url(url)
    plan = make_plan(
        concurrency=concurrency,
        rate=rate,
        requests=requests,
        input_len=input_len,
        output_len=output_len,
        vocab=vocab,
        prompts=prompts,
        seed=seed,
        warmup=warmup,
    )
    if json_path not in (None, "-") and not Path(str(json_path)).absolute().parent.is_dir():
        raise Fault(f"--json {json_path}: the folder does not exist", 2)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    machine = describe()  # before the load: the load average is about what else runs
    model, outcomes = _run(plan, url, api_key, model, timeout)
    numbers = report(outcomes)
    settings = {
        "loop": "closed" if plan.times is None else "open",
        "concurrency": plan.concurrency if plan.times is None else None,
        "rate": rate,
        "requests": len(plan.calls),
        "input_len": None if prompts else input_len or DEFAULT_INPUT,
        "output_len": output_len,
        "vocab": None if prompts else vocab or DEFAULT_VOCAB,
        "prompts": None if prompts is None else str(prompts),
        "seed": seed,
        "warmup": warmup,
        "timeout": timeout,
    }
    _show(numbers, settings, model, url, to_stderr=json_path == "-")
    if json_path is not None:
        record = {
            "date": date,
            "server": {"url": url, "model": model},
            "settings": settings,
            "results": numbers,
            "client_machine": machine,
            "versions": {"brigade": _version("brigade"), "httpx": _version("httpx"), "python": python_version()},
            "percentiles": "linear interpolation between the closest ranks; seconds",
        }
        _write(json_path, record)
    if numbers["failed"]:
        raise typer.Exit(1)


def make_plan(
    *,
    concurrency: int | None,
    rate: float | None,
    requests: int | None,
    input_len: int | None,
    output_len: int,
    vocab: int | None,
    prompts: Path | None,
    seed: int,
    warmup: int,
) -> Plan:
    """Check the options against each other and fill in defaults. Raises Fault (bad input)."""
    if concurrency is not None and rate is not None:
        raise Fault("--concurrency (closed loop) and --rate (open loop) exclude each other", 2)
    if rate is not None and not 0 < rate < float("inf"):
        raise Fault(f"--rate must be greater than 0, not {rate}", 2)
    if prompts is not None and (input_len is not None or vocab is not None):
        raise Fault("--input-len and --vocab are for synthetic prompts; leave them out with --prompts", 2)
    if prompts is not None:
        lines = read_calls(prompts, output_len)
        calls, before = repeat(lines, requests or len(lines)), repeat(lines[::-1], warmup)
    else:
        lengths = (input_len or DEFAULT_INPUT, output_len, vocab or DEFAULT_VOCAB)
        # Other prompts than the measured ones, or the prefix cache would answer some of those.
        together = synthetic((requests or DEFAULT_REQUESTS) + warmup, *lengths, seed)
        before, calls = together[:warmup], together[warmup:]
    times = None if rate is None else arrivals(len(calls), rate, seed)
    return Plan(calls, before, concurrency or DEFAULT_CONCURRENCY, times)


def _run(plan: Plan, url: str, api_key: str | None, model: str | None, timeout: float) -> tuple[str, list[Outcome]]:
    import uvloop

    from brigade.cli.drive import Target, closed_loop, first_model, open_loop

    async def run(step: Callable[[Outcome], None]) -> tuple[str, list[Outcome]]:
        target = Target(url, model or await first_model(url, api_key), api_key, timeout)
        for outcome in await closed_loop(target, plan.warmup, 1, lambda _: None):
            if outcome.failure:
                raise Fault(f"{url}: a warm-up request failed: {outcome.detail}")
        if plan.times is None:
            return target.model, await closed_loop(target, plan.calls, plan.concurrency, step)
        return target.model, await open_loop(target, plan.calls, plan.times, step)

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("requests", total=len(plan.calls))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(run(lambda _: progress.advance(task)))


def _show(numbers: dict[str, Any], settings: dict[str, Any], model: str, url: str, *, to_stderr: bool) -> None:
    from rich.console import Console

    console = Console(stderr=to_stderr, highlight=False, markup=False, emoji=False)
    console.print(headline(numbers, settings, model, url), soft_wrap=True)
    console.print(latency_table(numbers))
    for line in throughput_lines(numbers):
        console.print(line, soft_wrap=True)


def headline(numbers: dict[str, Any], settings: dict[str, Any], model: str, url: str) -> str:
    """What was measured, in one line."""
    how = f"rate {settings['rate']:g}/s" if settings["loop"] == "open" else f"concurrency {settings['concurrency']}"
    return f"{model} at {url}: {numbers['requests']} requests, {how}, {numbers['seconds']:.1f} s"


def latency_table(numbers: dict[str, Any]) -> "Table":
    """TTFT, TPOT, ITL and E2E at each percentile."""
    from rich.table import Table

    table = Table()
    for column in ("", *(f"p{q}" for q in PERCENTILES), "mean", "n"):
        table.add_column(column, justify="left" if column == "" else "right")
    for key, label in _MEASURES.items():
        row = numbers[key]
        if row is None:
            table.add_row(label, *["-"] * (len(PERCENTILES) + 1), "0")
        else:
            table.add_row(
                label, *(show_seconds(row[c]) for c in (*(f"p{q}" for q in PERCENTILES), "mean")), str(row["n"])
            )
    return table


def throughput_lines(numbers: dict[str, Any]) -> list[str]:
    """Rates, failures and what may spoil the measurement, a line each."""
    cached = f", {numbers['cached_input_tokens']} of {numbers['input_tokens']} from the prefix cache"
    lines = [
        f"requests/s       {numbers['requests_per_second']:.2f}",
        f"input tokens/s   {numbers['input_tokens_per_second']:.1f}"
        + (cached if numbers["cached_input_tokens"] else ""),
        f"output tokens/s  {numbers['output_tokens_per_second']:.1f}, "
        f"{numbers['output_tokens_per_answer']:.1f} tokens an answer",
        f"failed           {numbers['failed']} of {numbers['requests']}",
    ]
    lines += [f"  {kind}: {n}" for kind, n in numbers["failures"].items()]
    if numbers["first_error"]:
        lines.append(f"  first error: {numbers['first_error']}")
    if numbers["max_late"] > 0.05:
        lines.append(f"some requests were sent up to {show_seconds(numbers['max_late'])} late: this client was busy")
    return lines


def _write(path: str, record: dict[str, Any]) -> None:
    text = json.dumps(record, indent=1) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return
    try:
        Path(path).write_text(text)
    except OSError as e:
        raise Fault(f"--json {path}: cannot be written ({e.strerror})") from e


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
