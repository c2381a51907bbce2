"""`brigade experts`: how busy a server's routed experts keep its ranks, in the terminal and as a picture."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from brigade.cli.fault import Fault, one_line
from brigade.cli.heatmap import Panel, colour, draw, ink_on, over_mean, span
from brigade.cli.protocol import DEFAULT_URL, base_url, error_text, headers, is_loopback

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from brigade.engine.loads import ExpertLoads, UnitLoads

DEADLINE = 40.0
"""Seconds for the answer: ranks tell their counts between two steps."""


def experts(
    url: Annotated[str, typer.Option(help="Address of the server.")] = DEFAULT_URL,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="BRIGADE_API_KEY", help="The server's key. Prefer the variable: other users can see command lines."
        ),
    ] = None,
    unit: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of this unit alone, like decode-0. Default: of all.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw one unit's heat map into this PNG file.")
    ] = None,
    json_path: Annotated[
        str | None, typer.Option("--json", metavar="PATH", help="Write what the server said; - is stdout.")
    ] = None,
) -> None:
    """Show a server's expert load: layer by rank, busiest over mean, before and after experts moved.

    A number is a rank's load over the mean rank's of its layer, of recent tokens: 1.00 everywhere is a perfect split.
    """
    from rich.console import Console

    body = fetch(base_url(url), api_key)
    units = chosen(parse(body), unit)
    drawn = only_one(units) if png is not None else None
    if json_path == "-":
        sys.stdout.write(body.decode() + "\n")
    else:
        show_all(Console(), units)
    try:
        if json_path not in (None, "-"):
            Path(str(json_path)).write_bytes(body + b"\n")
        if png is not None and drawn is not None:
            draw(png, *captions(drawn), [x.layer for x in drawn.layers], panels(drawn))
    except OSError as e:
        raise Fault(f"cannot write {e.filename or png}: {e.strerror}") from e


def fetch(url: str, api_key: str | None) -> bytes:
    """The body of /debug/experts. Raises Fault."""
    import httpx

    try:
        with httpx.Client(trust_env=not is_loopback(url), timeout=DEADLINE) as client:
            answer = client.get(f"{url}/debug/experts", headers=headers(api_key))
    except httpx.HTTPError as e:
        raise Fault(f"no answer from {url}: {one_line(str(e)) or type(e).__name__}; is the server running?") from e
    if answer.status_code != 200:
        raise Fault(f"{url}/debug/experts: {error_text(answer.status_code, answer.content)}")
    return answer.content


def parse(body: bytes) -> "list[UnitLoads]":
    """What /debug/experts said. Raises Fault for something else."""
    import msgspec

    from brigade.engine.loads import Experts

    try:
        units = msgspec.json.decode(body, type=Experts).units
    except msgspec.MsgspecError as e:
        raise Fault(f"/debug/experts did not answer as this version of Brigade does: {e}") from e
    for loads in (unit.loads for unit in units if unit.loads):
        if not loads.layers or any(len(x.rank_loads) != loads.n_ranks for x in loads.layers):
            raise Fault("/debug/experts answered without layers, or with layers of other ranks")
    return units


def chosen(units: "list[UnitLoads]", name: str | None) -> "list[UnitLoads]":
    """The one with this name, or all. Raises Fault."""
    found = [unit for unit in units if name in (None, unit.unit)]
    if not found:
        names = ", ".join(one_line(unit.unit) for unit in units) or "none"
        raise Fault(f"--unit: there is no unit {name!r}; there are: {names}", 2)
    return found


def only_one(units: "list[UnitLoads]") -> "ExpertLoads":
    """What a picture is of. Raises Fault for several units, and for one that does not tell."""
    if len(units) > 1:
        raise Fault(f"--png draws one unit; name it with --unit: {', '.join(one_line(u.unit) for u in units)}", 2)
    if (loads := units[0].loads) is None:
        raise Fault(f"{one_line(units[0].unit)}: {one_line(units[0].problem)}")
    return loads


def show_all(console: "Console", units: "list[UnitLoads]") -> None:
    """Unit by unit, with their names if there are several."""
    from rich.text import Text

    for i, unit in enumerate(units):
        if len(units) > 1:
            console.print(Text(f"{chr(10) if i else ''}unit {one_line(unit.unit)}", style="bold"))
        if unit.loads is None:
            console.print(Text(one_line(unit.problem)))
        else:
            show(console, unit.loads)


def captions(loads: "ExpertLoads") -> tuple[str, str]:
    """Title and subtitle of the picture, and the first lines in the terminal."""
    title = (
        f"Expert load: busiest rank over mean {loads.busiest_over_mean_before:.2f} as placed at the start, "
        f"{loads.busiest_over_mean:.2f} as placed now"
    )
    moved = loads.moved
    what = f"{moved.experts} slots changed hands" + (
        f", last on {moved.last[:19].replace('T', ' at ')} UTC" if moved.last else ""
    )
    if moved.dropped:
        what += f"; {moved.dropped} portions could not be moved (see the server's log)"
    n = sum(loads.layers[0].tokens)
    subtitle = (
        f"{loads.n_ranks} {_plural('rank', loads.n_ranks)}, {loads.n_experts} experts + {loads.redundant} redundant a "
        f"layer, {n} expert calls a layer so far; {what}"
    )
    return title, subtitle


def panels(loads: "ExpertLoads") -> list[Panel]:
    """The maps to show: only one where nothing has moved."""
    now = Panel("as placed now", over_mean([x.rank_loads for x in loads.layers]))
    if not loads.moved.experts:
        return [now]
    return [Panel("as placed at the start", over_mean([x.rank_loads_before for x in loads.layers])), now]


def show(console: "Console", loads: "ExpertLoads") -> None:
    """The maps in the terminal, one below the other."""
    from rich.text import Text

    title, subtitle = captions(loads)
    console.print(Text(title, style="bold"))
    console.print(Text(subtitle, style="dim"))
    maps = panels(loads)
    reach = span(maps)
    layers = [x.layer for x in loads.layers]
    room = console.width - 18
    per_cell = -(-loads.n_ranks // max(room, 1))
    cells = -(-loads.n_ranks // per_cell)
    width = next((w for w in (6, 2) if cells * w <= room), 1)
    for panel in maps:
        console.print()
        console.print(Text(panel.title, style="bold"))
        console.print(_ruler(loads.n_ranks, per_cell, width))
        for layer, row, busiest in zip(layers, panel.loads, panel.busiest, strict=True):
            line = Text(f"layer {layer:>3}  ")
            for first in range(0, loads.n_ranks, per_cell):
                value = max(row[first : first + per_cell])
                paper = colour(value, reach)
                text = f"{value:^{width}.2f}" if width == 6 else " " * width
                line.append(text, style=f"rgb{_rgb(ink_on(paper))} on rgb{_rgb(paper)}")
            line.append(f"  {busiest:.2f}")
            console.print(line, soft_wrap=True)
    if per_cell > 1:
        console.print(Text(f"each cell is the busiest of {per_cell} ranks; --png draws them all", style="dim"))
    if loads.n_ranks > 1 and any(sum(x.received) for x in loads.layers):
        console.print()
        since = "since the last move" if loads.moved.experts else "since the start"
        console.print(
            f"rows that ranks really computed {since}: busiest over mean {loads.busiest_over_mean_received:.2f}"
        )


def _ruler(n_ranks: int, per_cell: int, width: int) -> "Text":
    """Rank numbers above their cells, as many as there is room for."""
    from rich.text import Text

    line, every = "", max(1, 6 // width)
    for i, first in enumerate(range(0, n_ranks, per_cell)):
        if i % every == 0:
            line = line.ljust(i * width) + f"{first:^{width}}" if width == 6 else line.ljust(i * width) + str(first)
    return Text(f"{'rank':>9}  {line}".ljust(11) + "  busiest", style="dim")


def _rgb(c: tuple[int, int, int]) -> str:
    return f"({c[0]},{c[1]},{c[2]})"


def _plural(noun: str, n: int) -> str:
    return noun if n == 1 else f"{noun}s"
