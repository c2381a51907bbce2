"""`brigade doctor`: what this machine offers to Brigade, and what to do where that is too little. Changes nothing.

Readings are taken first (readings.py); each check is a pure function from readings to a Check.
"""

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from brigade.cli.fault import one_line
from brigade.cli.readings import PackageReading, Readings, TorchReading, take_readings
from brigade.cli.units import show_size
from brigade.kernels.cpu.build import Buildable, Built
from brigade.kernels.cpu.compiler import Compiler, Unavailable

if TYPE_CHECKING:
    from rich.table import Table

Verdict = Literal["ok", "warn", "fail"]
MIB, GIB = 1 << 20, 1 << 30
DEMO_MEMORY = 1 * GIB
"""What serving the demo model takes: mostly Python and torch in two processes, not the model."""
SHM_ADVISED = 256 * MIB
FILES_ADVISED = 1024
X86_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
ARM_FEATURES = ("bf16", "i8mm")


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report. `advice` says what to do; empty when nothing is."""

    name: str
    value: str
    verdict: Verdict = "ok"
    advice: str = ""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port that the server would use.")] = 8000,
) -> None:
    """Check CPU, memory, compiler, kernels, torch, packages and the port. Exit code 1 if Brigade cannot run here."""
    checks = examine(take_readings(port))
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        from rich.console import Console

        Console(highlight=False, emoji=False).print(as_table(checks))
        typer.echo(verdict_line(checks))
    if any(check.verdict == "fail" for check in checks):
        raise typer.Exit(1)


def examine(r: Readings) -> list[Check]:
    """All checks, in the order in which they are shown."""
    return [
        check_python(r.python),
        Check("CPU", r.cpu.model),
        check_features(r.machine, r.cpu.features),
        check_cores(r.cores, r.limits.cores),
        check_memory(r.memory_total, r.memory_available, r.limits.memory, r.limits.memory_used),
        check_shm(r.shm_size),
        check_open_files(r.open_files),
        check_compiler(r.compiler),
        check_kernels(r.kernels),
        check_torch(r.torch),
        check_gpu(r.torch),
        check_packages(r.packages),
        check_port(r.port, r.port_problem),
        check_demo(r.demo_problem, r.demo_folder),
    ]


def check_python(version: tuple[int, int, int]) -> Check:
    shown = ".".join(map(str, version))
    if version < (3, 11, 0):
        return Check("Python", shown, "fail", "install Python 3.11 or newer")
    return Check("Python", shown)


def check_features(machine: str, features: frozenset[str]) -> Check:
    """CPU instructions that decide how fast a model runs. None is needed: torch has slower ways."""
    if not features:
        return Check("CPU features", f"{machine}: not listed by this system")
    arm = machine.lower() in ("aarch64", "arm64")
    wanted = ARM_FEATURES if arm else X86_FEATURES
    found = ", ".join(f for f in wanted if f in features) or "none of " + ", ".join(wanted)
    if not arm and "avx2" not in features:
        return Check("CPU features", found, "warn", "without AVX2 answers are slow; use a machine made after 2015")
    if not arm and "avx512f" not in features:
        return Check("CPU features", found, "ok", "AVX-512 would make CPU serving faster; not needed")
    return Check("CPU features", found)


def check_cores(usable: int, quota: float | None) -> Check:
    """Cores by affinity, and the share of them that a control group allows."""
    if quota is None or quota >= usable:
        return Check("cores", str(usable))
    threads = max(1, int(quota))
    return Check(
        "cores",
        f"{usable}, limited to {quota:g} by the control group",
        "warn",
        f"raise the container's CPU limit, or serve with --threads {threads}: more threads would only wait",
    )


def check_memory(total: int, available: int, limit: int | None, used: int) -> Check:
    """Memory that a new process may take, against what the demo model needs."""
    free = available if limit is None else min(available, max(0, limit - used))
    shown = f"{show_size(free)} free of {show_size(total if limit is None else min(total, limit))}"
    if limit is not None and limit < total:
        shown += " (control group limit)"
    if free < DEMO_MEMORY // 2:
        return Check("memory", shown, "fail", f"free some memory: the demo model takes about {show_size(DEMO_MEMORY)}")
    if free < DEMO_MEMORY:
        return Check("memory", shown, "warn", f"tight: the demo model takes about {show_size(DEMO_MEMORY)}")
    return Check("memory", shown)


def check_shm(size: int | None) -> Check:
    """Shared memory, through which several ranks on one machine exchange tensors."""
    if size is None:
        return Check("/dev/shm", "none on this system")
    if size < SHM_ADVISED:
        advice = "enough for one process; for several ranks start the container with --shm-size=1g"
        return Check("/dev/shm", show_size(size), "warn", advice)
    return Check("/dev/shm", show_size(size))


def check_open_files(limit: int | None) -> Check:
    """Each client connection takes one open file."""
    if limit is None:
        return Check("open files", "no limit")
    if limit < FILES_ADVISED:
        return Check("open files", str(limit), "warn", f"ulimit -n {4 * FILES_ADVISED}: each connection takes one")
    return Check("open files", str(limit))


def check_compiler(compiler: Compiler | Unavailable) -> Check:
    """Fast CPU kernels are built at first use; without a compiler torch computes everything."""
    if isinstance(compiler, Unavailable):
        return Check("C++ compiler", compiler.reason, "warn", compiler.advice)
    return Check("C++ compiler", f"{compiler.command[0]}: {compiler.version}")


def check_kernels(kernels: Built | Buildable | Unavailable) -> Check:
    """The library of the C++ kernels; without it torch computes everything. No advice, no warning."""
    if isinstance(kernels, Unavailable):
        return Check("CPU kernels", kernels.reason, "warn" if kernels.advice else "ok", kernels.advice)
    notes = "".join(f" ({note})" for note in kernels.notes)
    if isinstance(kernels, Buildable):
        shown = f"will be built at first use with {kernels.compiler.name}, into {kernels.folder}"
        return Check("CPU kernels", shown + notes)
    made = "prebuilt" if kernels.origin == "prebuilt" else "built"
    return Check("CPU kernels", f"{made}, {kernels.path}{notes}")


def check_torch(torch: TorchReading) -> Check:
    if torch.problem:
        return Check("torch", torch.problem, "fail", "reinstall Brigade in a fresh virtual environment")
    bf16 = "fast bfloat16" if torch.fast_bf16 else "no fast bfloat16"
    onednn = "oneDNN" if torch.mkldnn else "no oneDNN"
    shown = f"{torch.version}, {torch.threads} threads, {torch.capability}, {onednn}, {bf16}"
    if not torch.mkldnn:
        return Check("torch", shown, "warn", "this build multiplies matrices slowly; use an official wheel")
    return Check("torch", shown)


def check_gpu(torch: TorchReading) -> Check:
    return Check("GPU", ", ".join(torch.gpus) or "none that torch can use; Brigade runs on the CPU")


def check_packages(packages: list[PackageReading] | None) -> Check:
    """Every package that Brigade's own metadata asks for, in a version that it accepts."""
    if packages is None:
        shown = "brigade runs from a folder and is not installed, so its needs are unknown"
        return Check("packages", shown, "warn", "pip install -e . in its repository")
    wrong = [p for p in packages if p.installed is None or not satisfies(p.installed, p.operator, p.wanted)]
    if wrong:
        shown = ", ".join(f"{p.name} {p.installed or 'missing'} (needs {p.operator}{p.wanted})" for p in wrong)
        return Check(
            "packages", shown, "fail", "pip install " + " ".join(f"'{p.name}{p.operator}{p.wanted}'" for p in wrong)
        )
    return Check("packages", ", ".join(f"{p.name} {p.installed}" for p in packages))


def satisfies(installed: str, operator: str, wanted: str) -> bool:
    """Whether a version meets a requirement; the operators are those that Brigade's own metadata uses: >=, == or none.

    Raises ValueError for others.
    """
    if operator == "":
        return True
    width = max(len(release(installed)), len(release(wanted)))
    have, want = (v + (0,) * (width - len(v)) for v in (release(installed), release(wanted)))
    if operator == ">=":
        return have >= want
    if operator == "==":
        return have == want
    raise ValueError(f"unknown operator {operator!r}")


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version without what follows them: "2.13.0+cpu" -> (2, 13, 0)."""
    numbers = []
    for part in version.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if digits:
            numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)


def check_port(port: int, problem: str | None) -> Check:
    if problem is None:
        return Check("port", f"{port} is free on 127.0.0.1")
    return Check("port", f"{port}: {problem}", "warn", "end what uses it, or serve with another --port")


def check_demo(problem: str | None, folder: str) -> Check:
    if problem is None:
        return Check("demo model", folder)
    return Check("demo model", problem, "fail", "reinstall Brigade: the bundled model is damaged")


def as_table(checks: list[Check]) -> "Table":
    """The report for people."""
    from rich.table import Table
    from rich.text import Text

    colour = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table()
    for column in ("check", "found", "", "what to do"):
        table.add_column(column, overflow="fold")
    for c in checks:
        verdict = Text(c.verdict, style=colour[c.verdict])
        table.add_row(Text(c.name), Text(one_line(c.value)), verdict, Text(one_line(c.advice)))
    return table


def verdict_line(checks: list[Check]) -> str:
    """The whole report in one line."""
    n_fail = sum(c.verdict == "fail" for c in checks)
    n_warn = sum(c.verdict == "warn" for c in checks)
    if n_fail:
        return f"Brigade cannot run here yet: {n_fail} of {len(checks)} checks failed."
    return "Brigade can run here" + (f"; warnings: {n_warn}." if n_warn else ".")
