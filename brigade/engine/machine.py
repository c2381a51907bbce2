"""What machine is this? Reads /proc, control groups and the platform; judges nothing. Every reader takes its root."""

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Cpu:
    model: str
    features: frozenset[str]
    """Flags as Linux names them; empty where the platform does not list any."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What control groups leave to this process; None: no limit."""

    cores: float | None = None
    memory: int | None = None
    memory_used: int = 0


def read_cpu(root: Path = Path("/")) -> Cpu:
    """Model and features from proc/cpuinfo, or what `platform` knows where there is none."""
    try:
        text = (root / "proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return Cpu(platform.processor() or platform.machine() or "unknown", frozenset())
    fields = dict(reversed([_field(line) for line in text.splitlines() if ":" in line]))  # the first core's win
    flags = fields.get("flags") or fields.get("Features") or ""
    model = fields.get("model name") or fields.get("Model") or fields.get("Processor") or platform.machine()
    return Cpu(model, frozenset(flags.split()))


def _field(line: str) -> tuple[str, str]:
    key, _, value = line.partition(":")
    return key.strip(), value.strip()


def read_limits(root: Path = Path("/")) -> Limits:
    """The tightest limits of this process's control groups, version 1 or 2, and of all groups above them."""
    groups = _groups(root / "proc/self/cgroup")
    base = root / "sys/fs/cgroup"
    cores: list[float] = []
    memory: list[tuple[int, int]] = []
    for folder in _upwards(base, groups.get("", "/")):  # version 2
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            cores.append(int(quota) / int(period))
        _add_memory(memory, folder, "memory.max", "memory.current", "inactive_file")
    for folder in _upwards(base / "cpu", groups.get("cpu", "/")):
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):  # -1 means no limit
            cores.append(int(quota) / int(period))
    for folder in _upwards(base / "memory", groups.get("memory", "/")):
        _add_memory(memory, folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    limit, used = min(memory, default=(None, 0))
    return Limits(min(cores, default=None), limit, used)


def _groups(path: Path) -> dict[str, str]:
    """Controller to group path; version 2's one group is under ""."""
    groups: dict[str, str] = {}
    for line in _read(path).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        groups |= dict.fromkeys(controllers.split(","), group)
    return groups


def _upwards(base: Path, group: str) -> Iterator[Path]:
    """A group's folder and those above it. In a container the path may name folders that only the host sees."""
    parts = [p for p in group.split("/") if p not in ("", ".", "..")]
    for n in range(len(parts), -1, -1):
        folder = base.joinpath(*parts[:n])
        if folder.is_dir():
            yield folder


def _add_memory(out: list[tuple[int, int]], folder: Path, limit_file: str, used_file: str, cache_key: str) -> None:
    limit, used = _read(folder / limit_file), _read(folder / used_file)
    if not limit.isdigit() or int(limit) >= 1 << 60:  # "max", or version 1's huge number: no limit
        return
    stat = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
    cache = int(stat.get(cache_key, "0"))  # counted as used, but given back when memory is asked for
    out.append((int(limit), max(0, (int(used) if used.isdigit() else 0) - cache)))


def _read(path: Path) -> str:
    """A small file's text; "" for one that this kind of machine does not have."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def usable_cores() -> int:
    """Cores that this process may be scheduled on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
