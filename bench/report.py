"""Turns measurements into lines of measurement, limit and ratio, as a table for the terminal and for the docs. Pure."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from bench.usage import Usage
from bench.workloads import Workload

US = "brigade"
COLUMNS = ("workload", "precision", "engine", "tok/s", "spread", "TTFT", "limit", "of limit", "Brigade / it", "others")


@dataclass(frozen=True)
class Sample:
    """One engine's result of one workload in one round."""

    engine: str
    precision: str
    workload: Workload
    round: int
    tokens_per_second: float
    ttft: float
    """Seconds."""
    limit: float
    """Tokens/s that the machine allowed, from what was measured right before."""
    usage: Usage


@dataclass(frozen=True)
class Line:
    """All rounds of one engine and workload, as medians."""

    workload: Workload
    precision: str
    engine: str
    tokens_per_second: float
    lowest: float
    highest: float
    ttft: float
    limit: float
    """Tokens/s that the machine allowed."""
    of_limit: float
    """Measurement over limit, taken round by round."""
    ours: float | None
    """Brigade's tokens/s of the same workload, precision and session; None if it was not measured."""
    other_cores: float
    """The highest of the rounds: cores that were busy with something else."""

    @property
    def brigade_ratio(self) -> float | None:
        """How many times faster Brigade is; below 1 this engine is faster."""
        return self.ours / self.tokens_per_second if self.ours and self.engine != US else None


def lines(samples: Sequence[Sample]) -> list[Line]:
    """One line for each workload, precision and engine, in the order in which they were first measured."""
    groups: dict[tuple[Workload, str], dict[str, list[Sample]]] = {}
    for s in samples:
        groups.setdefault((s.workload, s.precision), {}).setdefault(s.engine, []).append(s)
    made = []
    for (workload, precision), by_engine in groups.items():
        ours = _median([s.tokens_per_second for s in by_engine[US]]) if US in by_engine else None
        for engine, of_one in by_engine.items():
            rates = [s.tokens_per_second for s in of_one]
            made.append(
                Line(
                    workload=workload,
                    precision=precision,
                    engine=engine,
                    tokens_per_second=_median(rates),
                    lowest=min(rates),
                    highest=max(rates),
                    ttft=_median([s.ttft for s in of_one]),
                    limit=_median([s.limit for s in of_one]),
                    of_limit=_median([s.tokens_per_second / s.limit for s in of_one]),
                    ours=ours,
                    other_cores=max(s.usage.other_cores for s in of_one),
                )
            )
    return made


def cells(line: Line) -> tuple[str, ...]:
    """A line as text, in the order of COLUMNS."""
    return (
        line.workload.name,
        line.precision,
        line.engine,
        _number(line.tokens_per_second),
        f"{_number(line.lowest)}-{_number(line.highest)}",
        f"{line.ttft:.2f} s" if line.ttft >= 1 else f"{line.ttft * 1e3:.0f} ms",
        _number(line.limit),
        f"{line.of_limit:.0%}",
        "-" if line.brigade_ratio is None else f"{line.brigade_ratio:.2f}",
        f"{line.other_cores:.2f}",
    )


def as_table(all_lines: Sequence[Line]) -> Table:
    """For the terminal."""
    table = Table()
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if i < 3 else "right", no_wrap=True)
    for before, line in zip([None, *all_lines], all_lines, strict=False):
        if before is not None and (before.workload, before.precision) != (line.workload, line.precision):
            table.add_section()
        table.add_row(*cells(line))
    return table


def as_markdown(all_lines: Sequence[Line], session: dict[str, Any]) -> str:
    """For the docs: the table, and below it what it was measured with."""
    rows = [COLUMNS, tuple("---" if i < 3 else "--:" for i in range(len(COLUMNS))), *map(cells, all_lines)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    notes = "\n".join(f"- {note}" for note in session_notes(session))
    return f"{table}\n\n{notes}\n"


def session_notes(session: dict[str, Any]) -> list[str]:
    """What must be known to read the numbers, a sentence each."""
    machine, limits = session["machine"], session["limits"]
    return [
        f"{session['date']}: {machine['cpu']}, {session['threads']} threads; {session['model']}",
        f"prompts of {session['lengths']['n_in']} random tokens, all different; {session['lengths']['n_out']} output "
        f"tokens, greedy; medians of {session['rounds']} rounds, one engine at a time",
        f"limits in this session: {limits['read_gbs']:.0f} GB/s read, {limits['bf16_gflops']:.0f} GFLOP/s bf16, "
        f"{limits['int8_gops']:.0f} Gop/s int8 (medians of {len(session['all_limits'])} measurements, one before each "
        f"engine's turn; read between {min(x['read_gbs'] for x in session['all_limits']):.0f} and "
        f"{max(x['read_gbs'] for x in session['all_limits']):.0f} GB/s)",
        *(f"{name}: {_facts(facts)}" for name, facts in session["engines"].items()),
        *(f"trouble: {problem}" for problem in session["problems"]),
        "others: cores that were busy with something else, at most",
    ]


def _facts(facts: dict[str, Any]) -> str:
    return ", ".join(str(part) for part in (facts["version"], *facts["notes"]) if part)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)
