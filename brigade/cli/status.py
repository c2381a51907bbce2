"""`brigade status`: what a server's units do now, as a live table in the terminal, once, or as JSON."""

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from brigade.cli.fault import Fault, one_line
from brigade.cli.protocol import DEFAULT_URL, base_url, error_text, headers, is_loopback

if TYPE_CHECKING:
    import httpx
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text

    from brigade.serve.units import HandOvers, Percentiles, RankReport, ServerReport, UnitReport

DEADLINE = 10.0
"""Seconds for an answer, which the server has at hand."""
BAR = 6
"""Characters of a full cache's bar."""
AROUND = 12
"""Lines of a screen beside the table's rows."""


def status(
    url: Annotated[str, typer.Option(help="Address of the server.")] = DEFAULT_URL,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="BRIGADE_API_KEY", help="The server's key. Prefer the variable: other users can see command lines."
        ),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Show it once and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write what the server said and end.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1, max=3600)] = 1.0,
) -> None:
    """Show a server's units: ranks, roles, queues, KV pages, hand-overs, TTFT and TPOT of the last minute.

    Ends with exit code 1 if the server is not ready, with --once and --json; the live table goes on until Ctrl-C.
    """
    import httpx
    from rich.console import Console

    address = base_url(url)
    client = httpx.Client(headers=headers(api_key), trust_env=not is_loopback(address), timeout=DEADLINE)
    with client:
        if not once and not as_json and sys.stdout.isatty():
            _live(client, address, every)
            return
        body = fetch(client, address)
    report = parse(body)
    if as_json:
        sys.stdout.write(body.decode() + "\n")
    else:
        Console().print(shown(report, address))
    if not report.ready:
        raise typer.Exit(1)


def fetch(client: "httpx.Client", url: str) -> bytes:
    """The body of /debug/units. Raises Fault."""
    import httpx

    try:
        answer = client.get(f"{url}/debug/units")
    except httpx.HTTPError as e:
        raise Fault(f"no answer from {url}: {one_line(str(e)) or type(e).__name__}; is the server running?") from e
    if answer.status_code == 404:
        raise Fault(f"{url} has no /debug/units: it is another kind of server, or an older version of Brigade")
    if answer.status_code == 401:
        raise Fault(f"{url} needs its key: set BRIGADE_API_KEY, or give --api-key")
    if answer.status_code != 200:
        raise Fault(f"{url}/debug/units: {error_text(answer.status_code, answer.content)}")
    return answer.content


def parse(body: bytes) -> "ServerReport":
    """What /debug/units said. Raises Fault for something else."""
    import msgspec

    from brigade.serve.units import ServerReport

    try:
        return msgspec.json.decode(body, type=ServerReport)
    except msgspec.MsgspecError as e:
        raise Fault(f"/debug/units did not answer as this version of Brigade does: {e}") from e


def _live(client: "httpx.Client", url: str, every: float) -> None:
    """Look again and again until Ctrl-C. A server that does not answer any more is said, and asked again."""
    from rich.live import Live
    from rich.text import Text

    report, at = parse(fetch(client, url)), time.monotonic()
    with Live(screen=True, auto_refresh=False) as live:
        live.update(shown(report, url, lines=live.console.height), refresh=True)
        while True:
            time.sleep(every)
            try:
                new, now = parse(fetch(client, url)), time.monotonic()
            except Fault as e:
                live.update(Text(one_line(str(e)), style="bold red"), refresh=True)
                continue
            rate = (new.generation_tokens - report.generation_tokens) / (now - at)
            live.update(shown(new, url, rate, live.console.height), refresh=True)
            report, at = new, now


def shown(report: "ServerReport", url: str, rate: float | None = None, lines: int | None = None) -> "Group":
    """Everything for a terminal. `rate`: tokens a second since the last look. `lines`: that the screen has, which does
    not scroll: more ranks than fit are shown as units; None: it does."""
    from rich.console import Group
    from rich.text import Text

    state = Text("ready", style="bold green") if report.ready else Text(one_line(report.reason), style="bold red")
    head = Text.assemble((report.model, "bold"), f" at {url}   ", state, f"   up {_duration(report.uptime)}")
    n_ranks = sum(len(unit.ranks) for unit in report.units)
    by_unit = lines is not None and n_ranks > lines - AROUND
    parts: list[RenderableType] = [head, units_table(report.units, by_unit)]
    parts += [_unusual(unit) for unit in report.units if unit.state != "serving"]
    return Group(*parts, _requests(report, rate), _handovers(report.handovers))


def units_table(units: "list[UnitReport]", by_unit: bool = False) -> "Table":
    """One line for each rank, or for each unit, with the sums of its ranks."""
    from rich.table import Table

    # One space between columns: with two, caches of thousands of pages push the last ones out of 80 characters.
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="dim")
    for name in ("unit", "role"):
        table.add_column(name, no_wrap=True)
    for name in ("rank", "run", "wait"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("KV", no_wrap=True)
    for name in ("pages", "reserved", "offered", "restarts"):
        table.add_column(name, justify="right", no_wrap=True)
    for unit in units:
        ranks = [_together(unit.ranks)] if by_unit else unit.ranks
        for rank in ranks:
            first = rank is ranks[0]
            table.add_row(
                unit.name if first else "",
                unit.role if first else "",
                f"all {len(unit.ranks)}" if by_unit else str(rank.rank),
                *map(str, (rank.running, rank.waiting)),
                _bar(rank),
                f"{rank.kv_pages_used}/{rank.kv_pages}",
                *map(str, (rank.kv_pages_reserved, rank.kv_pages_offered)),
                str(unit.restarts) if first else "",
                style="red" if unit.reason else None,
            )
    return table


def _together(ranks: "list[RankReport]") -> "RankReport":
    """The sums of all of them."""
    from brigade.serve.units import RankReport

    return RankReport(**{name: sum(getattr(rank, name) for rank in ranks) for name in RankReport.__dataclass_fields__})


def _bar(rank: "RankReport") -> str:
    full = round(BAR * rank.kv_pages_used / max(rank.kv_pages, 1))
    return "\u2588" * full + "\u2591" * (BAR - full)


def _unusual(unit: "UnitReport") -> "Text":
    """What a unit does other than serving, and why."""
    from rich.text import Text

    becomes = f", becomes {unit.next_role}" if unit.role != unit.next_role else ""
    why = f": {one_line(unit.reason)}" if unit.reason else ""
    return Text(f"{unit.name}: {unit.state}{becomes}{why}", style="red" if unit.reason else "yellow")


def _requests(report: "ServerReport", rate: float | None) -> "Text":
    from rich.text import Text

    hits = report.cached_prompt_tokens / report.prompt_tokens if report.prompt_tokens else 0.0
    ended = ", ".join(f"{n} {reason}" for reason, n in report.finished.items() if n)
    lines = [
        f"TTFT         {_times(report.ttft)}",
        f"TPOT         {_times(report.tpot)}",
        f"prompts      {report.prompt_tokens} tokens, {100 * hits:.1f} % of them from the prefix cache",
        f"generated    {report.generation_tokens} tokens" + ("" if rate is None else f", {rate:.0f} a second now"),
        f"ended        {ended or 'no request yet'}",
    ]
    return Text("\n" + "\n".join(lines))


def _handovers(told: "HandOvers") -> "Text":
    from rich.text import Text

    states = ", ".join(f"{n} {state}" for state, n in told.states.items() if n)
    mean = f", {1e3 * told.seconds / told.fetched:.1f} ms each" if told.fetched else ""
    line = f"transfers    {told.fetched} fetched{mean}, {told.computed} computed again"
    return Text(f"requests     {states or 'none in flight'}\n{line}")


def _times(times: "Percentiles") -> str:
    if times.p50 is None or times.p99 is None:
        return "no request in the last minute"
    return f"p50 {1e3 * times.p50:.1f} ms, p99 {1e3 * times.p99:.1f} ms, {times.n} requests in the last minute"


def _duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {s} s" if minutes else f"{s} s"
