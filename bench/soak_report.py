"""What a soak found, and the page that says so."""

import platform
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version

from brigade.cli.machine import describe


@dataclass
class Tally:
    """What happened."""

    ends: Counter[str] = field(default_factory=Counter)
    """Requests by how they ended."""
    faults: Counter[str] = field(default_factory=Counter)
    recovered: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Fault -> seconds until a new request was answered, each time."""
    seconds: list[float] = field(default_factory=list)
    """How long whole answers took."""
    problems: list[str] = field(default_factory=list)
    n_quiet: int = 0
    most_held: int = 0
    """Series of pages and requests that were not zero at the end of a quiet moment."""
    sizes: dict[tuple[str, int], list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))
    """("gateway" or "rank", process) -> MiB of its own memory and open files, at each quiet moment."""

    def growth(self, kind: str) -> tuple[float, int]:
        """The most that a process of this kind grew from its first quiet moment to its last: MiB, open files."""
        sizes = [s for (of, _), s in self.sizes.items() if of == kind and len(s) > 1]
        grown = [(last[0] - first[0], last[1] - first[1]) for first, *_, last in sizes]
        return max((mib for mib, _ in grown), default=0.0), max((files for _, files in grown), default=0)


def report(tally: Tally, what: str) -> str:
    """The figures of a run of `what`, as Markdown."""
    machine = describe()
    n = sum(tally.ends.values())
    lines = [
        f"{what}. {date.today()}; {machine['cpu']}, {machine['cores']} cores, load average "
        f"{machine['load_average'][0]:.1f}; Python {platform.python_version()}, torch {version('torch')}.",
        "",
        "| requests | how many |",
        "|---|--:|",
        *(f"| {how} | {count} |" for how, count in tally.ends.most_common()),
        f"| all | {n} |",
        "",
        f"Answers took {_at(tally.seconds, 0.5):.2f} s (p50), {_at(tally.seconds, 0.99):.2f} s (p99), "
        f"{max(tally.seconds, default=0):.2f} s at most.",
        "",
        "| fault | times | s until a new request is answered, p50 | most |",
        "|---|--:|--:|--:|",
    ]
    for name in sorted(tally.faults):
        times = tally.recovered[name]
        lines.append(f"| {name} | {tally.faults[name]} | {_at(times, 0.5):.2f} | {max(times, default=0):.2f} |")
    every = [s for times in tally.recovered.values() for s in times]
    lines.append(f"| all | {sum(tally.faults.values())} | {_at(every, 0.5):.2f} | {max(every, default=0):.2f} |")
    gateway, rank = tally.growth("gateway"), tally.growth("rank")
    lines += [
        "",
        f"- quiet moments: {tally.n_quiet}; pages, reservations, offers or requests left at one of them: "
        f"{tally.most_held}",
        f"- most growth of a gateway: {gateway[0]:+.1f} MiB, {gateway[1]:+d} open files",
        f"- most growth of a rank: {rank[0]:+.1f} MiB, {rank[1]:+d} open files",
        f"- what should not have happened: {len(tally.problems)}",
        *(f"  - {problem}" for problem in tally.problems),
    ]
    return "\n".join(lines) + "\n"


def _at(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else 0.0
