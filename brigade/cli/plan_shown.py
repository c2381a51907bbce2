"""What `brigade plan` prints for people: tables and sentences. Decides nothing."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from brigade.plan.explained import Line
    from brigade.plan.question import Answer, Option
    from brigade.plan.rates import Calibration
    from brigade.plan.reproduce import Compared


def show(a: "Answer", c: "Calibration", explain: bool) -> None:
    """The answer for people."""
    from rich.console import Console

    console = Console(highlight=False, emoji=False)
    console.print(str(a.sentence), style="bold", markup=False)
    console.print(options_table(a.options))
    for i, o in enumerate(a.options, 1):
        console.print(f"{i}. {o.model}: {o.name}: {o.why}", markup=False)
    console.print(f"\ncrossover: {a.crossover}", markup=False)
    for note in a.notes:
        console.print(str(note), markup=False)
    console.print("assumed:", markup=False)
    for text in a.assumptions:
        console.print(f"  - {text}", markup=False)
    if explain:
        from brigade.plan.explained import explain as lines_of
        from brigade.plan.serving import Workload

        q = a.question
        w = Workload(a.options[0].users, q.n_in, q.n_out, q.hit)
        console.print(lines_table(lines_of(a.options[0], c, w)))


def options_table(options: "Iterable[Option]") -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = "output tokens/s; ranges and x/÷ are 80 % intervals, of rates at full use"
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("", "users", "nodes", "tok/s/card", "TTFT s", "TPOT ms", "$/M out", "kW"):
        table.add_column(name, justify="right", overflow="fold")  # a number that is cut off is another number
    for i, o in enumerate(options, 1):
        low, high = o.most_users_range
        rate = f"{o.tokens_per_gpu:,.0f}", f"{o.tokens_range[0]:,.0f}-{o.tokens_range[1]:,.0f}"
        table.add_row(
            f"{i}",
            f"{'' if o.fits else 'only '}{o.most_users:,.0f}\n{low:,.0f}-{high:,.0f}",
            f"{o.layout.nodes:g}\n{o.tokens_per_node:,.0f}/node",
            "\n".join(rate),
            _quantiles([f"{x:.2f}" for x in o.ttft], o.ttft_factor),
            _quantiles([f"{1e3 * x:.0f}" for x in o.tpot], o.tpot_factor),
            "-" if o.cost is None else f"{o.cost:.2f}\n{o.cost_range[0]:.2f}-{o.cost_range[1]:.2f}",
            f"{o.kilowatts:,.0f}",
        )
    return table


def _quantiles(values: "Iterable[str]", factor: float) -> str:
    lines = [f"p{p} {x}" for p, x in zip((50, 90, 99), values, strict=True)]
    return "\n".join([*lines, f"x/÷ {factor:.2g}"])


def lines_table(lines: "Iterable[Line]") -> "Table":
    from rich.table import Table

    table = Table(title="every term of the first option")
    for name in ("part", "term", "value", "formula", "source"):
        table.add_column(name, overflow="fold")
    last = ""
    for line in lines:
        part = str(line.part)
        table.add_row(
            *(str(x) for x in (part if part != last else "", line.name, line.value, line.formula, line.source))
        )
        last = part
    return table


def number(value: float) -> str:
    """Four digits, and thousands in full."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def compared_table(title: str, lines: "Iterable[Compared]") -> "Table":
    from rich.table import Table

    table = Table(title=title)
    for name in ("point", "what", "measured", "predicted", "error", "source"):
        table.add_column(
            name, overflow="fold", justify="right" if name in ("measured", "predicted", "error") else "left"
        )
    for x in lines:
        table.add_row(x.name, x.what, number(x.measured), number(x.predicted), f"{100 * x.error:+.0f} %", x.source)
    return table
