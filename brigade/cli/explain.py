"""`brigade explain`: what a deployment file comes to, before anything starts. Changes nothing; imports no torch."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brigade.cli.fault import Fault, one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from brigade.cli.explained import Explained, Memory, Unit

File = Annotated[Path, typer.Argument(help="The deployment file; docs/deploy.md describes it.", show_default=False)]


def explain(file: File, as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False) -> None:
    """Show what a deployment file comes to: every value with its reason, ranks, experts, memory and ports."""
    found = explained(file)
    if as_json:
        typer.echo(json.dumps(as_plain(found), indent=1))
        return
    from rich.console import Console

    show(found, Console(highlight=False, emoji=False, markup=False))


def explained(file: Path) -> "Explained":
    """Read a deployment file and its model's config.json. Raises Fault."""
    from brigade.cli.deployed import Deployed
    from brigade.cli.deployment_file import read_deployment
    from brigade.cli.explained import explain as explain_it
    from brigade.engine.auto import this_machine
    from brigade.spec.config import BadConfig, read_spec

    deployed = Deployed(file, read_deployment(file))
    try:
        return explain_it(deployed, read_spec(deployed.model, deployed.what.drafts), this_machine())
    except BadConfig as e:
        raise Fault(str(e), 2) from e


def as_plain(found: "Explained") -> dict[str, Any]:
    """The same for programs; bytes are numbers."""
    out = asdict(found)
    for plain, unit in zip(out["units"], found.units, strict=True):
        plain["memory"]["total"] = unit.memory.total
    return out


def show(found: "Explained", console: "Console") -> None:
    """The same for people."""
    table = _table("key", "value", "why")
    for v in found.values:
        table.add_row(v.key, one_line(v.value), one_line(v.why))
    console.print(f"{one_line(found.file)}", table, sep="\n")
    for i, unit in enumerate(found.units):
        console.print(f"\nunit {unit.name}")
        table = _table("key", "value", "why")
        for v in unit.values:
            table.add_row(v.key, v.value, v.why)
        console.print(table)
        console.print(_rank_table(unit))
        if any(u.memory == unit.memory for u in found.units[:i]):
            console.print("memory of a rank: as above")
        else:
            console.print(_memory_table(unit.memory))
            console.print(f"memory: {unit.memory.verdict}")
    console.print("\nports")
    table = _table("address", "port", "who connects", "guarded by")
    for p in found.ports:
        table.add_row(p.where, p.port, p.who, p.guard)
    console.print(table)
    for note in found.notes:
        console.print(f"note: {one_line(note)}")


def _rank_table(unit: "Unit") -> "Table":
    from brigade.cli.explained import ranges

    table = _table("rank", "host", "local rank", "routed experts, in each layer that has them")
    for r in unit.ranks:
        table.add_row(str(r.rank), r.host, str(r.local_rank), ranges(r.experts))
    return table


def _memory_table(memory: "Memory") -> "Table":
    from brigade.cli.units import show_size

    table = _table("memory of a rank", "bytes", "")
    for part, n_bytes in memory.weights.items():
        if n_bytes:
            kind = "float32" if part == "gates and norms" else memory.weight_type
            table.add_row(part, show_size(n_bytes), kind)
    each = f"{show_size(memory.kv_token)} a position"
    if memory.kv_cache is None:
        table.add_row("KV cache", "?", f"{each}; a quarter of what the weights leave free, unless kv_memory is given")
    else:
        table.add_row("KV cache", show_size(memory.kv_cache), f"{memory.kv_tokens} positions, {each}")
    table.add_row("in all", show_size(memory.total), "activations not counted")
    if memory.segment:
        table.add_row(
            "exchange", show_size(memory.segment), "a host's ranks together, at most; untouched pages are free"
        )
    return table


def _table(*columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
